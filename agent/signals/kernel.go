package signals

import (
	"errors"
	"io"

	"github.com/cilium/ebpf"

	"github.com/ckagent/ckagent/bpf/disk"
	"github.com/ckagent/ckagent/bpf/load"
	"github.com/ckagent/ckagent/bpf/net"
	"github.com/ckagent/ckagent/bpf/sock"
	"github.com/ckagent/ckagent/bpf/vcpu"
)

// Kernel is the programs that watch all VMs, as far as they could be loaded: the
// others are nil and listed in Missing.
type Kernel struct {
	VCPU    *vcpu.Monitor
	Disk    *disk.Monitor
	Net     *net.Monitor
	Sock    *sock.Monitor
	Missing []Lack
}

// Lack is a signal that this host does not give, and what is used instead.
type Lack struct {
	Program string `json:"program"`
	Reason  string `json:"reason"`
	Instead string `json:"instead"`
}

// instead says what is used where a program is missing.
var instead = map[string]string{
	"vcpu":     "run and wait shares from /proc/PID/task/TID/schedstat; no idle slots",
	"disk":     "bytes from /proc/PID/io (write_bytes: what reaches the block layer, late and without files)",
	"io_uring": "writes by io_uring are missing from the counts",
	"net":      "bytes by the process's sockets or none; no requests, stalls and idle slots of taps",
	"sock":     "no network figures of VMs without a tap",
	"dirty":    "dirty rates from the page map alone: no live counter between scans",
}

// LoadKernel loads what can be loaded.
func LoadKernel() *Kernel {
	k := &Kernel{}
	var err error
	if k.VCPU, err = vcpu.Load(); err != nil {
		k.lack("vcpu", err)
	}
	if k.Disk, err = disk.Load(); err != nil {
		k.lack("disk", err)
	} else if err := k.Disk.Missing(); err != nil {
		k.lack("io_uring", err)
	}
	if k.Net, err = net.Load(); err != nil {
		k.lack("net", err)
	}
	if k.Sock, err = sock.Load(); err != nil {
		k.lack("sock", err)
	}
	return k
}

func (k *Kernel) lack(program string, err error) {
	k.Missing = append(k.Missing, Lack{Program: program, Reason: reason(err), Instead: instead[program]})
}

func reason(err error) string {
	if e, ok := errors.AsType[*load.Error](err); ok {
		return load.Explain(e.Err)
	}
	return err.Error()
}

// Programs are the loaded programs, to ask the kernel what they cost.
func (k *Kernel) Programs() map[string]*ebpf.Program {
	out := map[string]*ebpf.Program{}
	add := func(object string, programs map[string]*ebpf.Program) {
		for name, p := range programs {
			out[object+"/"+name] = p
		}
	}
	if k.VCPU != nil {
		add("vcpu", k.VCPU.Programs())
	}
	if k.Disk != nil {
		add("disk", k.Disk.Programs())
	}
	if k.Net != nil {
		add("net", k.Net.Programs())
	}
	if k.Sock != nil {
		add("sock", k.Sock.Programs())
	}
	return out
}

// Close drops all programs.
func (k *Kernel) Close() error {
	var errs []error
	drop := func(loaded bool, c io.Closer) {
		if loaded {
			errs = append(errs, c.Close())
		}
	}
	drop(k.VCPU != nil, k.VCPU)
	drop(k.Disk != nil, k.Disk)
	drop(k.Net != nil, k.Net)
	drop(k.Sock != nil, k.Sock)
	return errors.Join(errs...)
}
