package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cespare/xxhash/v2"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
)

// Role says what the holder of a lease does with the checkpoint.
type Role string

const (
	Writing Role = "write"
	Reading Role = "read"
	Disk    Role = "disk" // an image is built on its volumes
)

// LeaseState says whether the holder of a lease is there.
type LeaseState string

const (
	Live    LeaseState = "live"    // the process runs on this host
	Dead    LeaseState = "dead"    // it does not, for certain
	Unknown LeaseState = "unknown" // another host or pid namespace: cannot be told from here
)

// Lease is a claim of one process on one checkpoint.
type Lease struct {
	Role       Role       `json:"role"`
	Host       string     `json:"host"`
	BootID     string     `json:"boot_id"`
	PIDSpace   string     `json:"pid_namespace"`
	PID        int        `json:"pid"`
	StartTicks uint64     `json:"start_ticks"` // field 22 of /proc/PID/stat
	State      LeaseState `json:"state"`
	Path       string     `json:"path,omitempty"` // of the image; role Disk
	file       string
}

func (l Lease) String() string {
	if l.Role == Disk {
		return fmt.Sprintf("the disk %s on %s is built on it (%s)", l.Path, l.Host, l.State)
	}
	return fmt.Sprintf("%s lease of pid %d on %s (%s)", l.Role, l.PID, l.Host, l.State)
}

const leasePrefix = "lease."

// identity is who we are, and how to find out whether others are alive. Tests
// put another host or boot in its place.
type identity struct {
	host, bootID, pidSpace string
	pid                    int
	startTicks             uint64
	alive                  func(pid int, startTicks uint64) bool
}

// self reads our identity.
func self() (identity, error) {
	id := identity{pid: os.Getpid(), alive: processAlive}
	name, err := os.Hostname()
	if err != nil {
		return id, err
	}
	// Two hosts of the same name are told apart by their machine ids.
	machine, _ := os.ReadFile("/etc/machine-id")
	id.host = fmt.Sprintf("%s+%08x", vmDir(name), uint32(xxhash.Sum64(bytes.TrimSpace(machine))))
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id, err
	}
	id.bootID = strings.ReplaceAll(strings.TrimSpace(string(boot)), "-", "")
	space, err := os.Readlink("/proc/self/ns/pid") // pid:[4026531836]
	if err != nil {
		return id, err
	}
	id.pidSpace = strings.TrimSuffix(strings.TrimPrefix(space, "pid:["), "]")
	self, err := procstat.Read(id.pid)
	id.startTicks = self.StartTicks
	return id, err
}

// processAlive says no only if it is certain.
func processAlive(pid int, start uint64) bool {
	s, err := procstat.Read(pid)
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	return err != nil || (s.StartTicks == start && !s.Ended())
}

func (id identity) leaseName(r Role, nonce uint32) string {
	return fmt.Sprintf("%s%s,%s,%s,%s,%d,%d,%08x", leasePrefix, r, id.host, id.bootID, id.pidSpace, id.pid, id.startTicks, nonce)
}

// parseLease reads the name of a lease file; ok is false for other files. A name
// that cannot be understood is a lease all the same, of an unknown holder.
func (id identity) parseLease(name string) (Lease, bool) {
	rest, ok := strings.CutPrefix(name, leasePrefix)
	if !ok {
		return Lease{}, false
	}
	l := Lease{Role: Reading, Host: "unknown", State: Unknown, file: name}
	f := strings.Split(rest, ",")
	if len(f) != 7 {
		return l, true
	}
	pid, err1 := strconv.Atoi(f[4])
	start, err2 := strconv.ParseUint(f[5], 10, 64)
	if err1 != nil || err2 != nil || pid <= 0 {
		return l, true
	}
	l = Lease{Role: Role(f[0]), Host: f[1], BootID: f[2], PIDSpace: f[3], PID: pid, StartTicks: start, State: Unknown, file: name}
	switch {
	case l.Host != id.host:
	case l.BootID != id.bootID:
		l.State = Dead
	case l.PIDSpace != id.pidSpace:
	case id.alive(l.PID, l.StartTicks):
		l.State = Live
	default:
		l.State = Dead
	}
	return l, true
}

// held picks the leases that protect, processes before images; force discounts those
// of unknown holders.
func held(leases []Lease, force bool) []Lease {
	var out, images []Lease
	for _, l := range leases {
		switch {
		case l.State != Live && (l.State != Unknown || force):
		case l.Role == Disk:
			images = append(images, l)
		default:
			out = append(out, l)
		}
	}
	return append(out, images...)
}

// addLease claims a checkpoint for this process. The caller holds the lock.
func (s *Store) addLease(dir string, r Role) (name string, err error) {
	name = s.id.leaseName(r, s.random())
	f, err := s.fs.Create(filepath.Join(dir, name))
	if err != nil {
		return "", err
	}
	// No sync: after a crash of the host the lease would be dead anyway.
	return name, f.Close()
}

// leaseProblem is the refusal to touch what somebody else uses.
func leaseProblem(op, id string, l []Lease) error {
	p := problem.New(problem.Busy, op, id, "in use: %v", l[0])
	if l[0].State == Unknown {
		return p.WithHint("if that host or container is gone for good, repeat with --force")
	}
	if l[0].Role == Disk {
		return p.WithHint("make it independent (restore with --disks-flatten, or qemu-img rebase -b '' %s while its VM is off), or remove it", l[0].Path)
	}
	return p.WithHint("wait until pid %d has finished", l[0].PID)
}

// removeFile removes a file that may be gone already.
func removeFile(f fsys.FS, name string) error {
	if err := f.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
