"""Number formats, what they do to a tensor, and the products that run in them."""
