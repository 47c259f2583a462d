package faultserver

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/cilium/ebpf/btf"

	"github.com/ckagent/ckagent/agent/passfd"
)

// kernelTypes are the kernel's types, which are read while there is nothing to wait for.
type kernelTypes struct {
	cache *btf.Cache
	done  chan struct{}
}

func readTypes(wanted bool) *kernelTypes {
	k := &kernelTypes{cache: btf.NewCache(), done: make(chan struct{})}
	if !wanted {
		close(k.done)
		return k
	}
	go func() { // joined by wait
		defer close(k.done)
		_, _ = k.cache.Kernel() // who needs them asks again, and learns why there are none
	}()
	return k
}

func (k *kernelTypes) wait() { <-k.done }

// awaitConfig gets ready for what is expected, and waits for the configuration and the
// files that come with it; errNotNeeded if none comes.
func awaitConfig(conn *net.UnixConn) (types *kernelTypes, cfg Config, files []*os.File, err error) {
	buf := make([]byte, passfd.MaxBytes)
	var e expectation
	if _, err := passfd.Receive(conn, buf, &e); err != nil {
		return nil, cfg, nil, fmt.Errorf("fault server: expectation: %w", err)
	}
	expected := readTypes(e.Engine == Kernel)
	defer func() {
		if err != nil {
			expected.wait()
		}
	}()
	files, err = passfd.Receive(conn, buf, &cfg)
	switch {
	case errors.Is(err, io.EOF):
		return nil, cfg, nil, errNotNeeded
	case err != nil:
		return nil, cfg, nil, fmt.Errorf("fault server: configuration: %w", err)
	}
	want := keptFile
	if cfg.Kept {
		want = maxFiles
	}
	if len(files) != want {
		return nil, cfg, nil, errors.Join(fmt.Errorf("fault server: configuration with %d files, want %d", len(files), want), passfd.Close(files))
	}
	return expected, cfg, files, nil
}

// errNotNeeded: whoever launched the process came to need none.
var errNotNeeded = errors.New("fault server: not needed")
