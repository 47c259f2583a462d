package restore

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/restore/liveness"
	"github.com/ckagent/ckagent/restore/plan"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// firmwareOnly is the quickest machine: it sits in its firmware.
func firmwareOnly(args ...string) vmtest.Config {
	return vmtest.Config{MemoryMiB: 64, Guest: vmtest.NoGuest, Args: args}
}

// failing restores, wants a failure, and checks that nothing is left of it.
func failing(t *testing.T, st *store.Store, id string, o Options, code problem.Code, words ...string) {
	t.Helper()
	res, err := Run(t.Context(), st, id, o)
	if res != nil {
		killRestored(t, res)
	}
	var p *problem.Error
	if !errors.As(err, &p) || p.Code != code {
		t.Fatalf("%v, want a problem of code %s", err, code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
	left, _ := filepath.Glob(o.RunRoot + "/*")
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range procs {
		if b, _ := os.ReadFile(f); strings.Contains(string(b), o.RunRoot) {
			t.Errorf("%s still runs: %q", f, b)
		}
	}
}

func TestRefusals(t *testing.T) {
	extra := filepath.Join(t.TempDir(), "table")
	if err := os.WriteFile(extra, make([]byte, 64), 0o600); err != nil {
		t.Fatal(err)
	}
	v := vmtest.Start(t, firmwareOnly("-fw_cfg", "name=opt/test,file="+extra))
	st := testStore(t)
	id := takeCheckpoint(t, v, st, nil)
	pid := strconv.Itoa(v.PID())

	t.Run("alive", func(t *testing.T) {
		failing(t, st, id, testOptions(t), problem.Refused, "is the process that was checkpointed", pid, "--assume-dead")
	})
	t.Run("alive by name", func(t *testing.T) {
		id := takeCheckpoint(t, v, st, func(m *image.Manifest) { m.Machine.Facts = nil })
		failing(t, st, id, testOptions(t), problem.Refused, "runs a VM of the name", pid)
	})
	t.Run("its socket is in use", func(t *testing.T) {
		o := testOptions(t)
		o.AssumeDead = true
		failing(t, st, id, o, problem.Refused, v.QMPPath(), "--map")
	})
	t.Run("clone beside it", func(t *testing.T) {
		o := testOptions(t)
		o.Clone = true
		res, err := Run(t.Context(), st, id, o)
		if err != nil {
			t.Fatal(err)
		}
		defer killRestored(t, res)
		if !v.Alive() || res.Name == v.Config().Name || !strings.HasPrefix(res.QMP, o.RunRoot) {
			t.Errorf("original alive %v, clone %q at %s", v.Alive(), res.Name, res.QMP)
		}
	})
	v.Kill()

	t.Run("another restore", func(t *testing.T) {
		o := testOptions(t)
		g, err := liveness.Hold(o.RunRoot, v.Config().Name)
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		if _, err := Run(t.Context(), st, id, o); !problem.Is(err, problem.Refused) || !strings.Contains(err.Error(), "pid "+strconv.Itoa(os.Getpid())) {
			t.Errorf("%v, want refused because of this process", err)
		}
	})
	t.Run("missing file", func(t *testing.T) {
		if err := os.Rename(extra, extra+".away"); err != nil {
			t.Fatal(err)
		}
		defer os.Rename(extra+".away", extra)
		failing(t, st, id, testOptions(t), problem.Refused, extra, "--map "+extra+"=")
		o := testOptions(t)
		m, err := plan.ParseMapping(extra + "=" + extra + ".away")
		if err != nil {
			t.Fatal(err)
		}
		o.Map = []plan.Mapping{m}
		res, err := Run(t.Context(), st, id, o)
		if err != nil {
			t.Fatalf("mapped: %v", err)
		}
		killRestored(t, res)
	})
	t.Run("QEMU does not start", func(t *testing.T) {
		o := testOptions(t)
		o.Extra = []string{"-device", "no-such-device"}
		failing(t, st, id, o, problem.Failed, "start", "no-such-device")
	})
	t.Run("state does not fit", func(t *testing.T) {
		// The state has no section of such a device, but one of each that is
		// missing now: a machine type that does not load it.
		other := takeOther(t, st)
		failing(t, st, other, testOptions(t), problem.Failed, "load the device state", "QEMU says")
	})
	t.Run("more memory than recorded", func(t *testing.T) {
		o := testOptions(t)
		o.Extra = []string{"-m", "96M"}
		failing(t, st, id, o, problem.Refused, "RAMBlock pc.ram")
	})
	t.Run("older QEMU", func(t *testing.T) {
		id := takeFrom(t, st, func(m *image.Manifest) { m.QEMU.Version = "99.0.0" })
		failing(t, st, id, testOptions(t), problem.Refused, "99.0.0", "--qemu")
	})
	t.Run("another binary", func(t *testing.T) {
		id := takeFrom(t, st, func(m *image.Manifest) { m.QEMU.BinaryPath = "/bin/sh" })
		failing(t, st, id, testOptions(t), problem.Refused, "not called like a QEMU")
	})
	t.Run("a binary others can write", func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, "qemu-system-x86_64")
		if err := os.WriteFile(path, []byte("#!/bin/sh\nexit 1\n"), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o777); err != nil {
			t.Fatal(err)
		}
		id := takeFrom(t, st, func(m *image.Manifest) { m.QEMU.BinaryPath = path })
		failing(t, st, id, testOptions(t), problem.Refused, "can be changed by others")
	})
	t.Run("libvirt", func(t *testing.T) {
		id := takeFrom(t, st, func(m *image.Manifest) {
			m.Machine.Argv = append(m.Machine.Argv, "-chardev", "socket,id=charmonitor,path=/var/lib/libvirt/qemu/x.sock,server=on,wait=off")
		})
		failing(t, st, id, testOptions(t), problem.Refused, "libvirt manages it")
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		o := testOptions(t)
		o.OnPhase = func(p Phase) {
			if p.Name == PhaseStarted {
				cancel()
			}
		}
		_, err := Run(ctx, st, id, o)
		if !problem.Is(err, problem.Cancelled) {
			t.Errorf("%v, want cancelled", err)
		}
		if left, _ := filepath.Glob(o.RunRoot + "/*"); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
	t.Run("QMP path taken", func(t *testing.T) {
		o := testOptions(t)
		o.QMPPath = filepath.Join(o.RunRoot, ".qmp")
		l, err := net.Listen("unix", o.QMPPath)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if _, err := Run(t.Context(), st, id, o); !problem.Is(err, problem.Refused) || !errors.Is(err, errInUse) {
			t.Errorf("%v, want refused because somebody listens", err)
		}
	})
}

// takeFrom takes a checkpoint of a machine of its own, with a changed manifest.
func takeFrom(t *testing.T, st *store.Store, edit func(m *image.Manifest)) string {
	t.Helper()
	v := vmtest.Start(t, firmwareOnly())
	defer v.Kill()
	return takeCheckpoint(t, v, st, edit)
}

// takeOther takes a checkpoint whose recorded command line lacks a device that its
// state has.
func takeOther(t *testing.T, st *store.Store) string {
	t.Helper()
	v := vmtest.Start(t, firmwareOnly("-device", "virtio-rng-pci"))
	defer v.Kill()
	return takeCheckpoint(t, v, st, func(m *image.Manifest) {
		for i, a := range m.Machine.Argv {
			if a == "virtio-rng-pci" {
				m.Machine.Argv = append(m.Machine.Argv[:i-1:i-1], m.Machine.Argv[i+1:]...)
				break
			}
		}
	})
}
