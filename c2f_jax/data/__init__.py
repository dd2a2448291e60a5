"""Reading data: manifests, prepared sets, audio, images, batches."""
