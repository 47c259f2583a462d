package capture

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
)

// Mode says what happens to RAM while the VM is stopped.
type Mode string

const (
	Auto   Mode = "auto"   // cow where the kernel can write-protect all of the RAM, else stop
	Stop   Mode = "stop"   // write it
	Buffer Mode = "buffer" // copy it to memory
	COW    Mode = "cow"    // write-protect it
)

// Engine says how a copy-on-write capture gets at old contents.
type Engine string

const (
	EngineAuto Engine = "auto" // the best one proven on this host
	EngineUffd Engine = "uffd" // userfaultfd write protection: the guest's writes wait for a copy
	EngineBPF  Engine = "bpf"  // the kernel copies pages before they are written
	EngineNone Engine = "none" // recorded for modes that need none
)

// Disks says what becomes of the writable disks.
type Disks string

const (
	DisksBackup Disks = "backup" // copied to the store
	// DisksOverlay copies them as well, but switches the drives to overlays meanwhile:
	// nothing of what the guest overwrites has to be kept in memory. A QEMU that ends
	// in between leaves its last writes in the overlay.
	DisksOverlay Disks = "overlay"
	// DisksSnapshot keeps them inside the images that the guest uses: nothing is copied,
	// and nothing survives the image.
	DisksSnapshot Disks = "snapshot"
	DisksNone     Disks = "none" // left out; a restore has to be told that this is meant
)

// Options of one checkpoint. Zero values mean the defaults. What is no function is passed
// between processes (package taker) as JSON.
type Options struct {
	Mode     Mode
	Engine   Engine
	Compress string // none, s2 or zstd

	// Direct writes pages past the host's page cache.
	Direct bool

	// Parent is the checkpoint to continue, of whose pages only those with another
	// content are stored: ParentAuto (default), ParentNone or an id.
	Parent string
	// FullEvery is how many checkpoints a chain has at most before a full one is taken;
	// 1: all are full ones, and none can be continued. Default DefaultFullEvery.
	FullEvery int
	// Dedup has content looked for elsewhere: in the VM's own RAM, and with Tenant in the
	// newest checkpoints of the other VMs of that name. VMs of different tenants, and of
	// none, share nothing.
	Dedup  bool
	Tenant string
	// Written, if not nil, is asked once in each attempt, while the VM stands still and its
	// device state is saved, in modes stop and buffer, what was written since a checkpoint:
	// if that is the parent, nothing else is read. nil: not known.
	Written func(ctx context.Context) (*Written, error) `json:"-"`
	// Track, if not nil, has engine bpf leave its marks where they are, and read no more
	// than was written since they were made if the next checkpoint continues this one.
	Track *Tracking `json:"-"`
	// Spare, if not nil, is where a fault server may be had that was started ahead.
	Spare *Spare `json:"-"`

	// MaxStall bounds how long a vCPU may wait for us. Default 100 ms.
	MaxStall time.Duration
	// ArenaBytes bounds the memory for pages on their way to the store in mode
	// cow. Default 96 MiB.
	ArenaBytes uint64
	// BufferBytes bounds the memory of mode buffer. Default: half of what is available.
	BufferBytes uint64
	// MinFreeBytes is what the checkpoint must leave free in the store.
	MinFreeBytes uint64

	Disks Disks // default: backup
	// DiskSpeedBytes bounds the copying of each disk, in bytes per second.
	DiskSpeedBytes uint64
	// DiskMemoryBytes bounds the memory for what the guest overwrites on its disks
	// before it was copied. Default: a quarter of what is available, at most 1 GiB.
	DiskMemoryBytes uint64
	// OverlayDir is where overlays are made, absolute: a guardian, which removes them
	// should we die, is elsewhere. Default: each beside its image.
	OverlayDir string

	// Helper is the command line that starts a helper process of ours: the verb
	// is appended. Default: this very binary.
	Helper []string

	// Proofs says where engine bpf can be trusted. Default: nothing is known.
	Proofs Proofs `json:"-"`

	// Quiesce, if not nil, brings the guest to rest just before the pause, such as
	// by freezing its file systems. What it returns is called when the guest runs
	// again, or if the attempt fails; an error of either gives the attempt up.
	Quiesce func(ctx context.Context) (undo func() error, err error) `json:"-"`

	// Pace, if not nil, is asked before bytes are written to the store and returns when
	// they may be. What is urgent, since a guest waits behind it, is only counted.
	Pace func(ctx context.Context, bytes int, urgent bool) error `json:"-"`

	// Progress, if not nil, is told about each step, from the caller's goroutine.
	Progress func(Event) `json:"-"`
}

// Event is one step of a checkpoint.
type Event struct {
	Step   string // mode, prearm, stop, resume, drain, disks, retake, commit
	Detail string
	Took   time.Duration // of the step that ended, if one did
}

const (
	defaultMaxStall = 100 * time.Millisecond
	defaultArena    = 96 << 20
	minArena        = 16 << 20
	maxArena        = 224 << 20 // the fault server stays below 256 MiB
)

func (o Options) withDefaults() (Options, error) {
	if o.Mode == "" {
		o.Mode = Auto
	}
	if o.Engine == "" {
		o.Engine = EngineAuto
	}
	if o.Compress == "" {
		o.Compress = "none"
	}
	if o.Parent == "" {
		o.Parent = ParentAuto
	}
	if o.FullEvery == 0 {
		o.FullEvery = DefaultFullEvery
	}
	if o.Disks == "" {
		o.Disks = DisksBackup
	}
	if o.MaxStall == 0 {
		o.MaxStall = defaultMaxStall
	}
	if o.ArenaBytes == 0 {
		o.ArenaBytes = defaultArena
	}
	usage := func(format string, args ...any) error {
		return problem.New(problem.Usage, "checkpoint", "", format, args...)
	}
	switch o.Mode {
	case Auto, Stop, Buffer, COW:
	case "tlc", "mtd", "replicate":
		return o, problem.New(problem.Refused, "checkpoint", "", "mode %q is not in this version", o.Mode).
			WithHint("use stop, buffer or cow")
	default:
		return o, usage("mode %q: want auto, stop, buffer or cow", o.Mode)
	}
	if o.FullEvery < 1 || o.FullEvery > image.MaxDepth {
		return o, usage("a full checkpoint every %d: want 1 to %d", o.FullEvery, image.MaxDepth)
	}
	if len(o.Tenant) > 200 {
		return o, usage("tenant %.40q: want at most 200 bytes", o.Tenant)
	}
	if o.Tenant != "" {
		o.Dedup = true
	}
	switch o.Disks {
	case DisksBackup, DisksOverlay, DisksSnapshot, DisksNone:
	default:
		return o, usage("disks %q: want backup, overlay, snapshot or none", o.Disks)
	}
	if o.OverlayDir != "" && !filepath.IsAbs(o.OverlayDir) {
		return o, usage("directory for overlays %q: want an absolute path", o.OverlayDir)
	}
	switch o.Engine {
	case EngineAuto, EngineUffd, EngineBPF:
	default:
		return o, usage("engine %q: want auto, uffd or bpf", o.Engine)
	}
	if o.MaxStall < time.Millisecond || o.MaxStall > 10*time.Second {
		return o, usage("longest stall %v: want 1ms to 10s", o.MaxStall)
	}
	if o.ArenaBytes < minArena || o.ArenaBytes > maxArena {
		return o, usage("capture memory of %d bytes: want %d to %d", o.ArenaBytes, minArena, maxArena)
	}
	return o, nil
}

func (o *Options) pace(ctx context.Context, bytes int, urgent bool) error {
	if o.Pace == nil {
		return nil
	}
	return o.Pace(ctx, bytes, urgent)
}

func (o *Options) tell(step string, took time.Duration, format string, args ...any) {
	if o.Progress != nil {
		o.Progress(Event{Step: step, Detail: fmt.Sprintf(format, args...), Took: took})
	}
}
