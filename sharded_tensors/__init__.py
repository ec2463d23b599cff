"""Named rectangles of global tensors in safetensors files: the one format of weights folders and training checkpoints.

    TENSORS.json        the index: shape, dtype and rectangles of every tensor, and metadata of the folder
    MANIFEST.json       size and SHA-256 of every other file
    *.safetensors       the rectangles
    TRAINING.json       training checkpoints only: step, samples, recipe section, layout, code version, losses
    source/             weights folders only: tokenizer, chat template, generation config and model card

A rectangle records its place in the global tensor, so a folder that was written for one parallel layout can be read
at any other. A rank whose layout matches reads its own files from beginning to end. No file is a pickle.
"""
