package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// network is a bridge with taps in a namespace of the test's own.
type network struct{ netns, qemu string }

func newNetwork(t *testing.T) *network {
	t.Helper()
	n := &network{netns: fmt.Sprintf("ckagent-e2e-%d", os.Getpid())}
	n.ip(t, "netns", "add", n.netns)
	t.Cleanup(func() { n.ip(t, "netns", "del", n.netns) })
	n.ip(t, "-n", n.netns, "link", "add", "br0", "type", "bridge")
	n.ip(t, "-n", n.netns, "link", "set", "br0", "up")
	for _, tap := range []string{"tap0", "tap1", "tap2"} {
		n.ip(t, "-n", n.netns, "tuntap", "add", tap, "mode", "tap")
		n.ip(t, "-n", n.netns, "link", "set", tap, "master", "br0", "up")
	}
	// A program that becomes QEMU in the namespace, with the same pid.
	n.qemu = filepath.Join(t.TempDir(), "qemu-system-x86_64")
	if err := os.WriteFile(n.qemu, []byte("#!/bin/sh\nexec ip netns exec "+n.netns+" qemu-system-x86_64 \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *network) ip(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("ip", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// fdb is what the bridge has learnt.
func (n *network) fdb(t *testing.T, args ...string) string {
	t.Helper()
	return n.ip(t, append([]string{"netns", "exec", n.netns, "bridge", "fdb"}, args...)...)
}

func (n *network) guest(mac, tap string) vmtest.Config {
	return vmtest.Config{Binary: n.qemu, Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 4, Rate: 2000, Idle: true, Args: []string{
		"-netdev", "tap,id=net0,ifname=" + tap + ",script=no,downscript=no", "-device", "virtio-net-pci,netdev=net0,romfile=,mac=" + mac}}
}

// TestNetworkIdentity: a restored VM announces itself where it comes up, on another
// tap if that is said, and whoever has its address is named.
func TestNetworkIdentity(t *testing.T) {
	const mac = "52:54:00:ab:cd:01"
	n := newNetwork(t)
	x := newTool(t)
	x.netns = n.netns
	v := vmtest.Start(t, n.guest(mac, "tap0"))
	c := x.checkpoint(t, v.PID())
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(n.fdb(t, "show", "br", "br0"), mac) {
		t.Fatal("the bridge knows the address before anybody announced it: the test tests nothing")
	}
	r, w := x.restore(t, c.ID, v.SerialPath(), "--map", "tap0=tap1")
	if argv := strings.Join(w.Argv(), " "); !strings.Contains(argv, "ifname=tap1") {
		t.Errorf("not mapped: %s", argv)
	}
	if len(r.Notes) > 0 {
		t.Errorf("nobody else has the address: %q", r.Notes)
	}
	learnt := func() string {
		for line := range strings.Lines(n.fdb(t, "show", "br", "br0")) {
			if strings.HasPrefix(line, mac) {
				return line
			}
		}
		return ""
	}
	for range 100 {
		if learnt() != "" {
			break
		}
		n.ip(t, "netns", "exec", n.netns, "sleep", "0.05")
	}
	if line := learnt(); !strings.Contains(line, "tap1") {
		t.Errorf("the bridge has learnt %q: not announced behind tap1", line)
	}

	t.Run("a clone on the network", func(t *testing.T) {
		// Unmapped it has none, and nothing to be warned of.
		r, k := x.restore(t, c.ID, v.SerialPath(), "--clone")
		if argv := strings.Join(k.Argv(), " "); strings.Contains(argv, "ifname=") || len(r.Notes) > 0 {
			t.Errorf("notes %q of %s", r.Notes, argv)
		}
		k.Kill()
		r, k = x.restore(t, c.ID, v.SerialPath(), "--clone", "--map", "tap0=tap2")
		argv := strings.Join(k.Argv(), " ")
		if !strings.Contains(argv, "ifname=tap2") || strings.Contains(argv, mac) {
			t.Errorf("want the mapped tap, and another address: %s", argv)
		}
		// Its running guest has the original's address all the same.
		for _, words := range [][]string{{mac, "also that of a card", w.Config().Name, itoa(w.PID())}, {mac, "tap1", "br0"}} {
			if !slices.ContainsFunc(r.Notes, func(n string) bool {
				return !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(n, word) })
			}) {
				t.Errorf("no warning says %q: %q", words, r.Notes)
			}
		}
		k.Kill()
	})
	w.Kill()

	t.Run("a tap that is not there", func(t *testing.T) {
		r, k := x.restore(t, c.ID, v.SerialPath(), "--map", "tap0=tap9")
		if len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "tap9") {
			t.Errorf("notes: %q", r.Notes)
		}
		k.Kill()
	})
	x.fails(t, exitUsage, []string{"tap7"}, "restore", c.ID, "--store", x.store, "--map", "tap7=tap1")
}
