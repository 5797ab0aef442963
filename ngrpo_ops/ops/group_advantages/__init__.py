"""Group-relative advantages: rewards centered and scaled within their groups."""
