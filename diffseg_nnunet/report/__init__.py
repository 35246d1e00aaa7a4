"""Pictures of images, references and predictions."""
