"""The trainer of the stages pretrain, align, distill and finetune."""
