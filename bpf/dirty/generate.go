package dirty

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -target amd64 -type target -cflags "-O2 -g -Wall -Werror -Wno-unused-variable -mcpu=v3 -nostdinc -I../headers" objects dirty.bpf.c
