"""Files of audio and images to arrays: what they hold, and what is odd about them."""
