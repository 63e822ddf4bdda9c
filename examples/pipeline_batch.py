"""Answer a batch of conversations and print all that a Response tells: `python examples/pipeline_batch.py [MODEL]`."""

import sys

from lmdeploy import ChatTemplateConfig, GenerationConfig, TurbomindEngineConfig, pipeline

if __name__ == "__main__":
    backend_config = TurbomindEngineConfig(
        model_name="internlm2",
        model_format="hf",
        tp=1,
        session_len=2048,
        max_batch_size=128,
        cache_max_entry_count=0.02,  # a fiftieth of the free memory for the KV cache
        cache_block_seq_len=64,
        quant_policy=0,
        rope_scaling_factor=0.0,
        use_logn_attn=False,
        download_dir=None,
        revision=None,
        max_prefill_token_num=8192,
    )
    chat_template_config = ChatTemplateConfig(model_name="internlm2", system=None, meta_instruction=None)
    gen_config = GenerationConfig(
        n=1,
        max_new_tokens=1024,
        top_p=0.8,
        top_k=40,
        temperature=0.8,
        repetition_penalty=1.0,
        ignore_eos=False,
        random_seed=None,
        stop_words=None,
        bad_words=None,
        min_new_tokens=None,
        skip_special_tokens=True,
    )
    pipe = pipeline(
        model_path=sys.argv[1] if len(sys.argv) > 1 else None,
        model_name="internlm2_chat_1_8b",
        backend_config=backend_config,
        chat_template_config=chat_template_config,
    )
    prompts = [[{"role": "user", "content": "Hi, pls intro yourself"}], [{"role": "user", "content": "Shanghai is"}]]
    for response in pipe(prompts, gen_config=gen_config):
        print("text:", response.text)
        print("generate_token_len:", response.generate_token_len)
        print("input_token_len:", response.input_token_len)
        print("session_id:", response.session_id)
        print("finish_reason:", response.finish_reason)
    pipe.close()
