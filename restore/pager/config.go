package pager

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"time"

	"github.com/ckagent/ckagent/restore/pager/order"
)

// Verbs of the two processes; the binary dispatches them to Main and SuperviseMain.
const (
	VerbWorker     = "__pager"
	VerbSupervisor = "__pagerd"
)

// What to do with a page that cannot be had.
const (
	BadPageBlock  = "block"  // who touches it waits; nothing wrong is ever seen
	BadPagePoison = "poison" // who touches it gets a memory error (SIGBUS), the rest is let go
)

// Block is a RAMBlock of the restored process.
type Block struct {
	Name       string `json:"name,omitempty"`
	ImageBlock int    `json:"image_block"` // its number in the source
	HVA        uint64 `json:"hva"`         // where it is mapped in the process
	Bytes      uint64 `json:"bytes"`       // whole pages
	Eager      bool   `json:"eager"`       // written before Start returns
}

// Pages of the block.
func (b Block) Pages() uint64 { return b.Bytes / PageBytes }

// Config is everything a pager needs. Zero values of the limits mean defaults.
type Config struct {
	Self     string      `json:"self"`             // the binary to run the processes from
	RunDir   string      `json:"run_dir"`          // of this restore alone, mode 0700
	ImageDir string      `json:"image_dir"`        // shorthand for Source{image}
	Source   *SourceSpec `json:"source,omitempty"` // nil: ImageDir

	QEMUPID   int    `json:"qemu_pid"`
	QEMUStart uint64 `json:"qemu_start"` // start time in ticks, field 22 of /proc/PID/stat
	RemoteFD  int    `json:"remote_fd"`  // the userfaultfd's number inside the process

	StarterPID   int    `json:"starter_pid"`   // whose Release NoDrain waits for; filled in by Start
	StarterStart uint64 `json:"starter_start"` // in ticks, as QEMUStart

	Blocks []Block `json:"blocks"`
	Hot    []Run   `json:"hot,omitempty"` // first to bring in; nil: what the source says

	Workers        int           `json:"workers"`          // fault threads; 2 to 4 by the cores
	Drainers       int           `json:"drainers"`         // background threads; up to 2
	ChunkBytes     uint64        `json:"chunk_bytes"`      // largest background copy; 512 KiB
	BytesPerSecond uint64        `json:"bytes_per_second"` // of the background; 0: unlimited
	MemoryBytes    uint64        `json:"memory_bytes"`     // of the worker; 256 MiB
	Retries        int           `json:"retries"`          // further attempts at a bad page; 4
	BadPage        string        `json:"bad_page"`         // BadPageBlock
	CollapseBudget time.Duration `json:"collapse_budget"`  // for huge pages after the drain; 1 s, negative: leave it to the kernel
	NoDrain        bool          `json:"no_drain"`         // serve faults and hot pages only, until Release or the starter's end
	DrainAfter     time.Duration `json:"drain_after"`      // NoDrain ends so long after the first fault, too; 0: it does not
	NoRealtime     bool          `json:"no_realtime"`      // fault threads at ordinary priority
}

// Bounds of a Config; it is read back from a file.
const (
	maxBlocks   = 4096
	maxHot      = 1 << 16
	maxWorkers  = 64
	maxChunk    = 4 << 20
	minChunk    = 64 << 10
	maxRAMBytes = 1 << 44
)

// Resolve fills in defaults and checks everything.
func (c *Config) resolve() error {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&c.Workers, min(4, max(2, runtime.NumCPU())))
	def(&c.Drainers, min(2, runtime.NumCPU()))
	def(&c.Retries, 4)
	if c.ChunkBytes == 0 {
		c.ChunkBytes = 512 << 10
	}
	if c.MemoryBytes == 0 {
		c.MemoryBytes = 256 << 20
	}
	if c.BadPage == "" {
		c.BadPage = BadPageBlock
	}
	if c.CollapseBudget == 0 {
		c.CollapseBudget = time.Second
	}
	if c.Source == nil {
		if c.ImageDir == "" {
			return errors.New("neither an image directory nor a source")
		}
		c.Source = ImageSpec(c.ImageDir)
	}
	switch {
	case c.Self == "" || !filepath.IsAbs(c.RunDir):
		return errors.New("the binary and an absolute run directory are needed")
	case c.QEMUPID <= 0 || c.RemoteFD < 0:
		return fmt.Errorf("pid %d, descriptor %d", c.QEMUPID, c.RemoteFD)
	case c.BadPage != BadPageBlock && c.BadPage != BadPagePoison:
		return fmt.Errorf("what to do with a bad page: %q", c.BadPage)
	case c.Workers < 1 || c.Workers > maxWorkers || c.Drainers < 1 || c.Drainers > maxWorkers:
		return fmt.Errorf("%d workers, %d drainers: 1 to %d of each", c.Workers, c.Drainers, maxWorkers)
	case c.StarterPID < 0 || c.DrainAfter < 0:
		return fmt.Errorf("starter %d, drain after %v", c.StarterPID, c.DrainAfter)
	case c.Retries < 0 || c.Retries > 1000:
		return fmt.Errorf("%d retries", c.Retries)
	case c.ChunkBytes%PageBytes != 0 || c.ChunkBytes < minChunk || c.ChunkBytes > maxChunk:
		return fmt.Errorf("chunk of %d bytes: %d to %d, whole pages", c.ChunkBytes, minChunk, maxChunk)
	case c.MemoryBytes < 32<<20:
		return fmt.Errorf("%d bytes of memory are too few", c.MemoryBytes)
	case len(c.Blocks) == 0 || len(c.Blocks) > maxBlocks:
		return fmt.Errorf("%d blocks", len(c.Blocks))
	case len(c.Hot) > maxHot:
		return fmt.Errorf("%d hot runs, %d at most", len(c.Hot), maxHot)
	}
	for i, b := range c.Blocks {
		if b.Bytes == 0 || b.Bytes%PageBytes != 0 || b.HVA%PageBytes != 0 || b.Bytes > maxRAMBytes ||
			b.HVA > 1<<47 || b.ImageBlock < 0 {
			return fmt.Errorf("block %d (%s): %d bytes at %#x", i, b.Name, b.Bytes, b.HVA)
		}
		for _, o := range c.Blocks[:i] {
			if b.HVA < o.HVA+o.Bytes && o.HVA < b.HVA+b.Bytes {
				return fmt.Errorf("blocks %s and %s overlap at %#x", o.Name, b.Name, b.HVA)
			}
		}
	}
	return nil
}

// lazy is the blocks that are paged in.
func (c *Config) lazy() (blocks []Block) {
	for _, b := range c.Blocks {
		if !b.Eager {
			blocks = append(blocks, b)
		}
	}
	return blocks
}

func (c *Config) plannerOptions() order.Options {
	o := order.Defaults()
	o.Chunk = c.ChunkBytes / PageBytes
	return o
}
