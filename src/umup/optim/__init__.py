"""From a plan to any torch optimizer: parameter groups, and the schedule that multiplies their rates."""
