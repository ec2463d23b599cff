"""The one trainer for pretrain, align, distill and finetune."""
