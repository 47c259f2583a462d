package restore

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/restore/pager"
	"github.com/ckagent/ckagent/tools/guest"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestMatrix restores each kind of machine lazily and has its guest verify all its
// memory. Whether the memory was really paged in is checked, not assumed.
func TestMatrix(t *testing.T) {
	small := vmtest.Config{MemoryMiB: 192, WSMiB: 8, SweepMS: 500}
	with := func(change func(c *vmtest.Config)) vmtest.Config {
		c := small
		change(&c)
		return c
	}
	for _, c := range []struct {
		name string
		cfg  vmtest.Config
	}{
		{"q35 two CPUs", with(func(c *vmtest.Config) { c.Machine, c.VCPUs = "q35", 2 })},
		{"memfd", with(func(c *vmtest.Config) { c.Backend = vmtest.Memfd })},
		{"prealloc", with(func(c *vmtest.Config) { c.Backend = vmtest.Prealloc })},
		{"mem-lock", with(func(c *vmtest.Config) { c.Args = []string{"-overcommit", "mem-lock=on"} })},
		{"mem-path", with(func(c *vmtest.Config) { c.Args = []string{"-mem-path", "/dev/shm", "-mem-prealloc"} })},
		{"file on tmpfs", with(func(c *vmtest.Config) { c.Backend = vmtest.FileTmpfs })},
		{"file on ext4", with(func(c *vmtest.Config) { c.Backend = vmtest.FileExt4 })},
		{"pflash, 12 virtio devices", with(func(c *vmtest.Config) { c.Machine, c.OVMF, c.VirtioDevices = "q35", true, 12 })},
		{"user network, video", with(func(c *vmtest.Config) { c.Echo, c.Args = true, []string{"-vga", "std"} })},
	} {
		t.Run(c.name, func(t *testing.T) { restoreMachine(t, c.cfg) })
	}
}

func TestMatrixQEMU10(t *testing.T) {
	q, err := guest.QEMU10(t.Context())
	if err != nil {
		vmtest.Skip(t, "qemu10", "QEMU 10 cannot be unpacked here: %v", err)
	}
	for _, machine := range []string{"pc", "q35"} {
		t.Run(machine, func(t *testing.T) {
			restoreMachine(t, vmtest.Config{QEMU: q, Machine: machine, MemoryMiB: 192, WSMiB: 8, SweepMS: 500})
		})
	}
	// A checkpoint of 7.2 on 10.0, as after an upgrade of the host: the manifest names
	// the versioned machine type.
	for _, machine := range []string{"pc", "q35"} {
		t.Run("from 7.2 "+machine, func(t *testing.T) {
			v := vmtest.Start(t, vmtest.Config{Machine: machine, MemoryMiB: 192, WSMiB: 8, SweepMS: 500, VirtioDevices: 6})
			v.WaitSweeps(t, 1)
			st := testStore(t)
			id := takeCheckpoint(t, v, st, nil)
			v.Kill()
			o := testOptions(t)
			o.Binary, o.Extra = upgraded(t, q), q.Args
			logPhases(t, restoreAndCheck(t, st, id, o, v))
		})
	}
	// And back, where the older one knows the machine type.
	t.Run("to 7.2", func(t *testing.T) {
		v := vmtest.Start(t, vmtest.Config{QEMU: q, Machine: "pc-q35-7.2", MemoryMiB: 192, WSMiB: 8, SweepMS: 500, VirtioDevices: 6})
		v.WaitSweeps(t, 1)
		st := testStore(t)
		id := takeCheckpoint(t, v, st, withoutFirmwarePath)
		v.Kill()
		o := testOptions(t)
		o.Binary = "/usr/bin/qemu-system-x86_64"
		res := restoreAndCheck(t, st, id, o, v)
		if !strings.Contains(strings.Join(res.Notes, " "), "older than the checkpoint's 10.") {
			t.Errorf("notes %q do not say that QEMU is older", res.Notes)
		}
	})
	t.Run("to 7.2 refused", func(t *testing.T) {
		v := vmtest.Start(t, vmtest.Config{QEMU: q, Machine: "q35", MemoryMiB: 64, Guest: vmtest.NoGuest})
		st := testStore(t)
		id := takeCheckpoint(t, v, st, withoutFirmwarePath)
		v.Kill()
		o := testOptions(t)
		o.Binary = "/usr/bin/qemu-system-x86_64"
		o.OnPhase = func(p Phase) {
			if p.Name != PhasePlanned {
				t.Errorf("phase %s was reached: QEMU was started", p.Name)
			}
		}
		failing(t, st, id, o, problem.Refused, "it is QEMU 7.", "taken on 10.", "machine type pc-q35-10.", "--qemu")
	})
}

// withoutFirmwarePath takes out where the other QEMU has its firmware.
func withoutFirmwarePath(m *image.Manifest) {
	argv := m.Machine.Argv
	for i := 1; i+1 < len(argv); {
		if argv[i] == "-L" {
			argv = slices.Delete(argv, i, i+2)
			continue
		}
		i++
	}
	m.Machine.Argv = argv
}

// upgraded is a program that runs another QEMU with the environment it needs.
func upgraded(t *testing.T, q guest.QEMU) string {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "qemu-system-x86_64")
	script := "#!/bin/sh\n"
	for _, kv := range q.Env {
		script += "export '" + kv + "'\n"
	}
	if err := os.WriteFile(path, []byte(script+"exec '"+q.Binary+"' \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestMatrixKVM uses the guest that a nested KVM runs.
func TestMatrixKVM(t *testing.T) {
	vmtest.NeedKVM(t)
	restoreMachine(t, vmtest.Config{Accel: "kvm", Guest: vmtest.Mini, MemoryMiB: 128, WSMiB: 4})
}

// restoreMachine takes a machine from its start through checkpoint, death and lazy
// restore.
func restoreMachine(t *testing.T, cfg vmtest.Config) {
	t.Helper()
	v := vmtest.Start(t, cfg)
	v.WaitSweeps(t, 1)
	st := testStore(t)
	o := testOptions(t)
	if len(cfg.QEMU.Env) > 0 {
		o.Binary = upgraded(t, cfg.QEMU) // its libraries are not where a system has them
	}
	id := takeCheckpoint(t, v, st, nil)
	v.Kill()
	res := restoreAndCheck(t, st, id, o, v)
	logPhases(t, res)
	if !res.Lazy || res.LazyBytes < uint64(cfg.MemoryMiB)<<20 {
		t.Errorf("%d of %d bytes were paged in lazily", res.LazyBytes, res.RAMBytes)
	}
	attached(t, res)
}

// attached fails if anything of ours is left in a drained VM.
func attached(t *testing.T, res *Result) {
	t.Helper()
	fds, err := filepath.Glob("/proc/" + itoa(res.QEMUPID) + "/fd/*")
	if err != nil || len(fds) == 0 {
		t.Fatalf("descriptors of %d: %v", res.QEMUPID, err)
	}
	for _, fd := range fds {
		if link, _ := os.Readlink(fd); strings.Contains(link, "userfaultfd") {
			t.Errorf("%s is %s", fd, link)
		}
	}
	smaps, err := os.ReadFile("/proc/" + itoa(res.QEMUPID) + "/smaps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(smaps)) {
		if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok {
			for _, f := range strings.Fields(flags) {
				if slices.Contains([]string{"um", "uw", "ui"}, f) {
					t.Errorf("memory is still registered (%s)", f)
				}
			}
		}
	}
	// The last thing a pager does is to end, after it has said in its run directory
	// that it is done.
	eventually(t, 10*time.Second, "the pager's processes end", func() bool { return len(pagersOf(t, res.RunDir)) == 0 })
}

// eventually fails the test if the condition has not come true within the limit.
func eventually(t *testing.T, limit time.Duration, what string, condition func() bool) {
	t.Helper()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for deadline := time.After(limit); !condition(); {
		select {
		case <-again.C:
		case <-deadline:
			t.Fatalf("waited %v in vain: %s", limit, what)
		}
	}
}

// pagersOf are the command lines of the pagers and supervisors of a run directory.
func pagersOf(t *testing.T, runDir string) []string {
	t.Helper()
	out, err := exec.Command("ps", "-eo", "args").Output()
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, runDir) && (strings.Contains(line, pager.VerbWorker) || strings.Contains(line, pager.VerbSupervisor)) {
			found = append(found, line)
		}
	}
	return found
}
