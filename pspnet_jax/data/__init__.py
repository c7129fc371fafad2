"""The input pipeline, and the only part that imports TensorFlow: out come tf.data datasets of uint8 images and labels."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its start-up notes are noise

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")  # TensorFlow would reserve the memory that training needs
