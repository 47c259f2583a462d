package diskcopy

import (
	"time"

	"github.com/ckagent/ckagent/agent/procstat"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm"
)

// FullEvery is the length at which a chain of volumes ends: a restore reads through
// all of it, and a damaged link loses what follows.
const FullEvery = 8

const (
	// DefaultSpeed bounds a copy, in bytes per second: QEMU works on it in the
	// thread that also serves the guest's devices.
	DefaultSpeed = 256 << 20

	// DefaultStall is long: the guest does not wait.
	DefaultStall = 10 * time.Second

	minMemory     = 8 << 20 // for one disk
	maxAutoMemory = 1 << 30 // for all disks, unless more was asked for
)

// Config is what a Set works on.
type Config struct {
	QMP     *qmp.Client
	Sources []vm.DiskSource
	Store   *store.Store
	Txn     *store.Txn
	VM      string

	SpeedBytes  uint64        // per second and disk; 0: DefaultSpeed
	Stall       time.Duration // without progress before a copy is given up; 0: DefaultStall
	MemoryBytes uint64        // for old content, all disks together; 0: by what the host has
	// Overlay, if not nil, has the drives switched to overlays, which take the guest's
	// writes while the images are copied, instead of filters that keep old content.
	Overlay *Overlay
}

// memory is how much each disk may use for old content.
func (c *Config) memory() (uint64, error) {
	total := c.MemoryBytes
	if total == 0 {
		available, err := procstat.AvailableMemory()
		if err != nil {
			return 0, err
		}
		total = min(available/4, maxAutoMemory)
	}
	return max(total/uint64(max(len(c.Sources), 1)), minMemory) &^ 0xffff, nil
}
