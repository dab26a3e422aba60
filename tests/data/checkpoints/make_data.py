# Makes rope.safetensors: rotary frequencies, cosines and sines by transformers, for tests/checkpoint/rope_test.cc.
# Run from the repository root; needs torch, transformers, safetensors.
import torch, json
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from safetensors.torch import save_file
cases=[]
out={}
pos=torch.tensor([[0,1,2,63,1000,8191,65535]])
def case(hd, maxp, **rp):
    c=LlamaConfig(hidden_size=hd*2,num_attention_heads=2,head_dim=hd,max_position_embeddings=maxp,rope_parameters=dict(rp))
    e=LlamaRotaryEmbedding(c)
    i=len(cases)
    pos=torch.tensor([[0,1,2,63,1000,8191,65535]])
    cos,sin=e(torch.zeros(1,dtype=torch.float32),pos)
    h=hd//2
    out[f'{i}.inv_freq']=e.inv_freq.clone().float(); out[f'{i}.attention_factor']=torch.tensor([e.attention_scaling],dtype=torch.float64)
    out[f'{i}.cos']=cos[0,:,:h].clone(); out[f'{i}.sin']=sin[0,:,:h].clone()
    cases.append({'head_dim':hd,'max_position_embeddings':maxp,'rope_parameters':rp})
case(64,2048,rope_type='default',rope_theta=10000.0)
case(128,8192,rope_type='default',rope_theta=500000.0)
case(80,4096,rope_type='default',rope_theta=1234567.0)
case(64,8192,rope_type='linear',rope_theta=10000.0,factor=4.0)
case(96,8192,rope_type='linear',rope_theta=10000.0,factor=3.0)
case(128,131072,rope_type='llama3',rope_theta=500000.0,factor=8.0,low_freq_factor=1.0,high_freq_factor=4.0,original_max_position_embeddings=8192)
case(64,131072,rope_type='llama3',rope_theta=500000.0,factor=32.0,low_freq_factor=1.0,high_freq_factor=4.0,original_max_position_embeddings=8192)
case(128,65536,rope_type='yarn',rope_theta=10000.0,factor=20.0,beta_fast=32.0,beta_slow=1.0,mscale=1.0,original_max_position_embeddings=4096)
case(64,65536,rope_type='yarn',rope_theta=50000.0,factor=7.0,beta_fast=24.0,beta_slow=2.0,original_max_position_embeddings=1024,truncate=False)
case(64,65536,rope_type='yarn',rope_theta=10000.0,factor=40.0,mscale=0.707,mscale_all_dim=1.0,original_max_position_embeddings=4096)
case(64,65536,rope_type='yarn',rope_theta=10000.0,factor=16.0,attention_factor=1.25,original_max_position_embeddings=4096)
out['positions']=pos[0]
import os
os.makedirs('tests/data/checkpoints',exist_ok=True)
save_file(out,'tests/data/checkpoints/rope.safetensors',metadata={'cases':json.dumps(cases),'made_by':'transformers LlamaRotaryEmbedding'})
