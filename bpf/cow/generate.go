package cow

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -target amd64 -type state -type prepare_args -cflags "-O2 -g -Wall -Werror -Wno-unused-variable -mcpu=v3 -nostdinc -I../headers" objects cow.bpf.c
