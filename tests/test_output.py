"""What the trainers give to other tools and take from them: precision, LoRAs in any naming, header, card, the hub."""
import pytest

def test_smoke(train, teacher):
    out = train(validation_prompts=["a red apple"])
    print((out / "README.md").read_text())
    from conftest import lora_file
    print(lora_file(out)[1])
    again = train(lora_path=out, max_train_steps=1)
    again = train(lora_path=out / "unet", max_train_steps=1, lora_alpha=2)
    with pytest.raises(SystemExit) as e:
        train(lora_path=out / "unet", max_train_steps=1, lora_rank=2)
    print(e.value)
    with pytest.raises(SystemExit) as e:
        train(push_to_hub=True, hub_token="hf_secret")
    print(e.value)
