"""A page and a JSON API for search by voice, with the limits that strangers need."""
