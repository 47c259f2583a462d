package disk

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -target amd64 -type file_key -type written -type process -cflags "-O2 -g -Wall -Werror -Wno-unused-variable -mcpu=v3 -nostdinc -I../headers" objects disk.bpf.c
