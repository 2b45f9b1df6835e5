"""The operating point: solved, stored, held while traffic changes, and watched: audits and drift ask, of requests that
have been answered, whether calibration still tells the truth. No image is decoded and no stage is chosen here."""
