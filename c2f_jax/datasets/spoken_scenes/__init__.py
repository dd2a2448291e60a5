"""The data set `spoken_scenes`, which is made on the user's machine."""
