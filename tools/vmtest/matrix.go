package vmtest

import (
	"context"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/guest"
)

// Case is a configuration that ckagent has to handle.
type Case struct {
	Name   string
	Config Config
	// StopOnly says that guest RAM cannot be write-protected there, so only mode
	// stop works (private mappings of files on a disk file system).
	StopOnly bool
	// CoveredBy names the cases that together have all of its parts: whole rounds with a
	// checkpoint leave it out but in long runs.
	CoveredBy string
	// need returns a reason to skip, with a stable id, or "".
	need func(ctx context.Context, c *Config) (id, reason string, err error)
}

// Prepare makes what the case needs (another QEMU) and skips the test, with a
// stable reason, where this machine cannot run it.
func (c Case) Prepare(t testing.TB) Config {
	t.Helper()
	cfg := c.Config
	if c.need == nil {
		return cfg
	}
	id, reason, err := c.need(t.Context(), &cfg)
	if err != nil {
		t.Fatalf("vmtest: prepare %s: %v", c.Name, err)
	}
	if id != "" {
		Skip(t, id, "%s", reason)
	}
	return cfg
}

// Matrix is every machine that has to work: chipsets, CPUs, memory backends,
// firmware, device counts, QEMU versions, accelerators. Guests are idle but for
// their working set; a test raises WSMiB and Rate as it needs.
func Matrix() []Case {
	linux := func(c Config) Config {
		if c.WSMiB == 0 {
			c.WSMiB, c.Rate, c.SweepMS = 32, 2000, 500
		}
		return c
	}
	cases := []Case{
		{Name: "pc", Config: linux(Config{Machine: "pc"}), CoveredBy: "pc-2cpu"},
		{Name: "q35", Config: linux(Config{Machine: "q35"}), CoveredBy: "q35-2cpu"},
		{Name: "pc-2cpu", Config: linux(Config{Machine: "pc", VCPUs: 2, Append: "GD_AUDIT=1 GD_THREADS=2"})},
		{Name: "q35-2cpu", Config: linux(Config{Machine: "q35", VCPUs: 2, Append: "GD_AUDIT=1"})},
		{Name: "memfd", Config: linux(Config{Backend: Memfd})},
		{Name: "file-tmpfs", Config: linux(Config{Backend: FileTmpfs})},
		{Name: "file-ext4", Config: linux(Config{Backend: FileExt4}), StopOnly: true, need: needDiskFS},
		{Name: "prealloc", Config: linux(Config{Backend: Prealloc}), CoveredBy: "pc-2cpu and memfd"},
		{Name: "ovmf", Config: linux(Config{Machine: "q35", OVMF: true})},
		{Name: "virtio-12", Config: linux(Config{Machine: "q35", VirtioDevices: 12})},
		{Name: "split-4g", Config: linux(Config{MemoryMiB: 5120})},
		{Name: "qemu10-pc", Config: linux(Config{Machine: "pc"}), CoveredBy: "qemu10-q35", need: needQEMU10},
		{Name: "qemu10-q35", Config: linux(Config{Machine: "q35", VirtioDevices: 4}), need: needQEMU10},
		{Name: "kvm-mini", Config: Config{Guest: Mini, Accel: "kvm", MemoryMiB: 64, WSMiB: 4, Rate: 400}, need: needKVM},
		{Name: "tcg-mini", Config: Config{Guest: Mini, MemoryMiB: 64, WSMiB: 16, Rate: 4000, SweepMS: 500}},
	}
	return cases
}

func needQEMU10(ctx context.Context, c *Config) (id, reason string, err error) {
	c.QEMU, err = guest.QEMU10(ctx)
	return "", "", err
}

func needKVM(context.Context, *Config) (id, reason string, err error) {
	if reason := kvmMissing(); reason != "" {
		return "kvm", reason, nil
	}
	return "", "", nil
}

// needDiskFS looks at where a machine's directory will be.
func needDiskFS(_ context.Context, c *Config) (id, reason string, err error) {
	dir := c.Dir
	if dir == "" {
		dir = os.TempDir()
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", "", err
	}
	if st.Type != unix.EXT4_SUPER_MAGIC {
		return "ext4", fmt.Sprintf("%s is not on ext4", dir), nil
	}
	return "", "", nil
}

// kvmMissing is why machines with -accel kvm cannot run here, "" if they can.
func kvmMissing() string {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "no usable /dev/kvm"
	}
	f.Close()
	return ""
}

// NeedKVM skips the test where there is no usable /dev/kvm.
func NeedKVM(t testing.TB) {
	t.Helper()
	if reason := kvmMissing(); reason != "" {
		Skip(t, "kvm", "%s", reason)
	}
}
