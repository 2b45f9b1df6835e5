"""What makes a bundle's frontier and profile: labelled images, and batches, through the deployed engine. No part of
answering a request; a server measures a short profile with it, at its start, and nothing else."""
