package probe

import (
	"context"
	"errors"
	"fmt"

	"github.com/ckagent/ckagent/bpf/dirty"
	"github.com/ckagent/ckagent/bpf/disk"
	"github.com/ckagent/ckagent/bpf/load"
	"github.com/ckagent/ckagent/bpf/net"
	"github.com/ckagent/ckagent/bpf/sock"
	"github.com/ckagent/ckagent/bpf/vcpu"
)

// The programs of the signals themselves: each is loaded and attached as it would be
// for a VM, and taken out again.

// dirtySignal also has faults of this process counted.
func dirtySignal(context.Context) (string, error) {
	c, err := dirty.Load()
	if err != nil {
		return "", cause(err)
	}
	const pages = 16
	seen, err := c.Self(pages)
	if err = errors.Join(err, c.Close()); err != nil {
		return "", err
	}
	if seen != pages {
		return "", fmt.Errorf("the program saw %d of %d pages written for it", seen, pages)
	}
	return fmt.Sprintf("counted the %d pages written for it", pages), nil
}

func vcpuSignal(context.Context) (string, error) {
	m, err := vcpu.Load()
	if err != nil {
		return "", cause(err)
	}
	return "attached to the scheduler", m.Close()
}

func diskSignal(context.Context) (string, error) {
	m, err := disk.Load()
	if err != nil {
		return "", cause(err)
	}
	if missing := m.Missing(); missing != nil {
		return "", errors.Join(fmt.Errorf("not for io_uring: %w", cause(missing)), m.Close())
	}
	return "attached to system calls and io_uring", m.Close()
}

// netSignal loads only: what it attaches to is a tap, which the probe of tcx stands
// for.
func netSignal(context.Context) (string, error) {
	m, err := net.Load()
	if err != nil {
		return "", cause(err)
	}
	return "loaded", m.Close()
}

func sockSignal(context.Context) (string, error) {
	m, err := sock.Load()
	if err != nil {
		return "", cause(err)
	}
	return "attached to sockets", m.Close()
}

// cause takes off what names the object: the probe's name says it.
func cause(err error) error {
	if e, ok := errors.AsType[*load.Error](err); ok {
		return e.Err
	}
	return err
}
