"""The one trainer for pretrain, align, distil and finetune."""
