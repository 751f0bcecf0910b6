"""From a URL to an image and its caption: no Ray, no model, nothing is written."""
