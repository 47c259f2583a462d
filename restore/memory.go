package restore

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/inject"
	"github.com/ckagent/ckagent/restore/pager"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

// lazyBytes is the size from which a block that is no guest RAM proper (video
// memory) is paged in: smaller ones are written before the guest runs.
const lazyBytes = 1 << 20

// memoryPlan decides block by block how memory comes in.
type memoryPlan struct {
	blocks []pager.Block
	lazy   uint64 // bytes
	notes  []string
}

// planMemory matches the recorded blocks with those of the new process. Lazy is
// only what is proved to hold no page: a page that is there never faults.
func planMemory(ctx context.Context, m *image.Manifest, have []vm.RAMBlock, pid int, eager bool) (*memoryPlan, error) {
	byName := make(map[string]*vm.RAMBlock, len(have))
	for i := range have {
		byName[have[i].Name] = &have[i]
	}
	pm, err := pagemap.Open(pid)
	if err != nil {
		return nil, problem.New(problem.Failed, "open pagemap", fmt.Sprintf("pid %d", pid), "%w", err)
	}
	defer pm.Close()
	mp := &memoryPlan{}
	var full []*vm.RAMBlock // candidates that hold pages, to be emptied
	var fullAt []int
	for i, b := range m.Blocks {
		h := byName[b.Name]
		if h == nil {
			return nil, problem.New(problem.Refused, "restore", "RAMBlock "+b.Name, "the new machine has no such memory (%d bytes in the checkpoint)", b.UsedBytes).
				WithHint("devices or memory differ from the checkpointed machine: compare the command line shown by --dry-run")
		}
		delete(byName, b.Name)
		if h.TotalBytes < b.UsedBytes || b.Main && h.UsedBytes != b.UsedBytes {
			return nil, problem.New(problem.Refused, "restore", "RAMBlock "+b.Name, "it has %d bytes, the checkpoint %d", h.UsedBytes, b.UsedBytes).
				WithHint("the memory size or firmware differs from the checkpointed machine")
		}
		if b.UsedBytes == 0 {
			continue
		}
		pb := pager.Block{Name: b.Name, ImageBlock: i, HVA: h.HVA, Bytes: b.UsedBytes, Eager: true}
		if !eager && lazyCandidate(b, h) {
			present, err := pm.AnyPresent(h.HVA, h.HVA+h.TotalBytes)
			if err != nil {
				return nil, problem.New(problem.Failed, "read pagemap", "RAMBlock "+b.Name, "%w", err)
			}
			pb.Eager = present
			if present && b.Main {
				full = append(full, h)
				fullAt = append(fullAt, len(mp.blocks))
			}
		}
		mp.blocks = append(mp.blocks, pb)
	}
	for name, h := range byName {
		if h.Main {
			return nil, problem.New(problem.Refused, "restore", "RAMBlock "+name, "the checkpoint has no such memory").
				WithHint("the new machine has more memory than the checkpointed one")
		}
		mp.notes = append(mp.notes, fmt.Sprintf("memory %s (%d bytes) is not in the checkpoint and starts as QEMU made it", name, h.UsedBytes))
	}
	if len(full) > 0 {
		if err := empty(ctx, pid, full); err != nil {
			mp.notes = append(mp.notes, fmt.Sprintf("pages that QEMU had touched could not be given back: %v", err))
		}
		for k, at := range fullAt {
			present, err := pm.AnyPresent(full[k].HVA, full[k].HVA+full[k].TotalBytes)
			if err != nil {
				return nil, problem.New(problem.Failed, "read pagemap", "RAMBlock "+full[k].Name, "%w", err)
			}
			mp.blocks[at].Eager = present
			if present {
				mp.notes = append(mp.notes, fmt.Sprintf("RAMBlock %s is restored eagerly: QEMU holds pages of it", full[k].Name))
			}
		}
	}
	for _, b := range mp.blocks {
		if !b.Eager {
			mp.lazy += b.Bytes
		}
	}
	return mp, nil
}

// lazyCandidate reports memory whose pages can be made to fault. Flash is read
// whole when the guest runs, and ROMs are full from the start.
func lazyCandidate(b image.Block, h *vm.RAMBlock) bool {
	if b.PageBytes != pager.PageBytes || h.PageBytes != pager.PageBytes {
		return false
	}
	if h.Backing != vm.Anonymous && h.Backing != vm.AnonShared && h.Backing != vm.Memfd {
		return false
	}
	return b.Main || b.UsedBytes >= lazyBytes && !h.ReadOnly && !strings.Contains(b.Name, "flash")
}

// empty gives pages back to the kernel from inside the process.
func empty(ctx context.Context, pid int, blocks []*vm.RAMBlock) error {
	s, err := inject.Open(ctx, pid)
	if err != nil {
		return err
	}
	var errs []error
	for _, b := range blocks {
		advice := uintptr(unix.MADV_DONTNEED)
		if b.Shared {
			advice = unix.MADV_REMOVE // a shared page also lives in the file
		}
		if _, err := s.Syscall(unix.SYS_MADVISE, uintptr(b.HVA), uintptr(b.TotalBytes), advice); err != nil {
			errs = append(errs, fmt.Errorf("RAMBlock %s: %w", b.Name, err))
		}
	}
	return errors.Join(append(errs, s.Close())...)
}
