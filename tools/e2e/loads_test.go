package e2e

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// load is what a guest or its host does while checkpoints are taken.
type load struct {
	name    string
	cfg     vmtest.Config
	types   string // into a shell of the guest
	disturb func(t *testing.T, v *vmtest.VM) (end func())
}

// loads are those that engine bpf is held against. What the guest writes by itself goes
// on beside each: it tells when something is wrong.
func loads() []load {
	small := vmtest.Config{MemoryMiB: 256, WSMiB: 64, Rate: 20000}
	disk := vmtest.Config{MemoryMiB: 256, WSMiB: 32, Rate: 2000, Disks: []vmtest.Disk{{FS: "ext4"}}}
	database := disk
	database.SQL = true
	return []load{
		{name: "20,000 pages a second", cfg: vmtest.Config{MemoryMiB: 512, WSMiB: 256, Rate: 20000}},
		{name: "20,000 pages a second, memfd, 2 vCPUs", cfg: vmtest.Config{MemoryMiB: 512, WSMiB: 256, Rate: 20000, VCPUs: 2, Backend: vmtest.Memfd}},
		{name: "100,000 pages a second", cfg: vmtest.Config{MemoryMiB: 512, WSMiB: 256, Rate: 100000}},
		{name: "as fast as it can", cfg: vmtest.Config{MemoryMiB: 384, WSMiB: 192, Rate: vmtest.Unlimited, VCPUs: 2}},
		{name: "shell that forks", cfg: vmtest.Config{MemoryMiB: 256, WSMiB: 32, Rate: 2000},
			types: "while :; do (:); /bin/true; echo x | cat >/dev/null; done"},
		{name: "database", cfg: database, disturb: func(t *testing.T, v *vmtest.VM) func() {
			b := newBank(t, v.SQLAddr())
			b.await(t, 10)
			return func() { b.await(t, 10) }
		}},
		{name: "page cache storms", cfg: disk,
			types: "dd if=/dev/zero of=/mnt/big bs=1M count=96; sync; while :; do cat /mnt/big >/dev/null; echo 3 >/proc/sys/vm/drop_caches; done"},
		{name: "compaction", cfg: small, disturb: every(200*time.Millisecond, func() error { return os.WriteFile("/proc/sys/vm/compact_memory", []byte("1"), 0) })},
		{name: "same-page merging", cfg: small, disturb: merging},
		{name: "swap pressure", cfg: small, disturb: swapping},
	}
}

// TestLoads takes many checkpoints by engine bpf of guests under loads, and of guests
// whose host is busy with their memory (CKAGENT_E2E_LOADS: how many of each; 0, the
// default, leaves it to the short tests of package faultserver).
func TestLoads(t *testing.T) {
	n, err := strconv.Atoi(os.Getenv("CKAGENT_E2E_LOADS"))
	if err != nil || n < 0 {
		n = 0
	}
	for _, c := range loads() {
		if n == 0 {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			x := newTool(t)
			if c.types != "" {
				c.withShell(filepath.Join(t.TempDir(), "tty"))
			}
			if c.disturb == nil {
				c.disturb = func(*testing.T, *vmtest.VM) func() { return func() {} }
			}
			consecutive(t, x, c.cfg, course{engine: "bpf", n: n, keep: 2, disturb: c.disturb})
		})
	}
}

// withShell gives the guest a shell on a second serial line, at a socket, and types.
func (c *load) withShell(socket string) {
	c.cfg.Append += " GD_SH=ttyS1"
	c.cfg.Args = append(c.cfg.Args, "-chardev", "socket,id=tty1,server=on,wait=off,path="+socket, "-serial", "chardev:tty1")
	c.disturb = func(t *testing.T, _ *vmtest.VM) func() {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintln(conn, c.types); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { // what the shell says is read, or it would stop; ended below
			_, err := io.Copy(io.Discard, conn)
			ended <- err
		}()
		return func() {
			select {
			case err := <-ended:
				t.Errorf("the guest's shell hung up: %v", err)
			default:
			}
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
			<-ended
		}
	}
}

// every does something again and again.
func every(d time.Duration, do func() error) func(*testing.T, *vmtest.VM) func() {
	return func(t *testing.T, _ *vmtest.VM) func() {
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			tick := time.NewTicker(d)
			defer tick.Stop()
			for {
				select {
				case <-stop:
					return
				case <-tick.C:
					if err := do(); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
		return func() { close(stop); wg.Wait() }
	}
}

// merging switches same-page merging on; QEMU has asked for it for its guest's RAM.
func merging(t *testing.T, _ *vmtest.VM) func() {
	const run = "/sys/kernel/mm/ksm/run"
	before, err := os.ReadFile(run)
	if err == nil {
		err = os.WriteFile(run, []byte("1"), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.WriteFile(run, before[:1], 0); err != nil {
			t.Error(err)
		}
	}
}

// swapping puts a sixteenth of the guest's RAM out to swap five times a second.
func swapping(t *testing.T, v *vmtest.VM) func() {
	path := filepath.Join(t.TempDir(), "swap")
	if err := os.WriteFile(path, make([]byte, 256<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"/sbin/mkswap", path}, {"/sbin/swapon", path}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	hva, bytes, err := v.MainRAM()
	if err != nil {
		t.Fatal(err)
	}
	piece, at := bytes/16, uint64(0)
	end := every(200*time.Millisecond, func() error {
		at = (at + 5*piece) % bytes
		return vmtest.PageOut(v.PID(), hva+at, piece)
	})(t, v)
	return func() {
		end()
		if out, err := exec.Command("/sbin/swapoff", path).CombinedOutput(); err != nil {
			t.Errorf("swapoff: %v: %s", err, out)
		}
	}
}
