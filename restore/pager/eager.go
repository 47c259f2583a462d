package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/uffd"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

const eagerChunk = 1 << 20

// writeEager gives the eager blocks their content: every page but zero pages of
// private memory that is empty, which would only be allocated for nothing.
func writeEager(ctx context.Context, cfg *Config, src PageSource, pm *pagemap.Pagemap, maps *mappings) error {
	mem, err := os.OpenFile("/proc/"+strconv.Itoa(cfg.QEMUPID)+"/mem", os.O_WRONLY, 0)
	if err != nil {
		return gone(err)
	}
	defer mem.Close()
	have := src.Blocks()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(cfg.Drainers)
	for _, b := range cfg.Blocks {
		if !b.Eager {
			continue
		}
		if b.ImageBlock >= len(have) || b.Pages() > have[b.ImageBlock] {
			return errors.Join(g.Wait(), problem.New(problem.Integrity, "write memory", b.Name,
				"the checkpoint has not so many pages of block %d", b.ImageBlock))
		}
		isAnon := maps.allAnonymous(b.HVA, b.HVA+b.Bytes)
		for at := uint64(0); at < b.Bytes && ctx.Err() == nil; at += eagerChunk {
			at, n := at, min(eagerChunk, b.Bytes-at)
			g.Go(func() error { return writeChunk(ctx, cfg.QEMUPID, mem, src, pm, b, at, n, isAnon) })
		}
	}
	return g.Wait()
}

func writeChunk(ctx context.Context, pid int, mem *os.File, src PageSource, pm *pagemap.Pagemap, b Block, off, bytes uint64, anon bool) error {
	for end := off + bytes; off < end; {
		first := off / PageBytes
		zero, n, err := src.Extent(b.ImageBlock, first, (end-off)/PageBytes)
		if err != nil {
			return err
		}
		if n == 0 {
			return problem.New(problem.Integrity, "write memory", b.Name, "page map ends at page %d", first)
		}
		size := n * PageBytes
		if zero && anon {
			present, err := pm.AnyPresent(b.HVA+off, b.HVA+off+size)
			if err != nil {
				return gone(err)
			}
			if !present {
				off += size
				continue
			}
		}
		buf := make([]byte, size)
		if !zero {
			if got, err := src.ReadRun(ctx, Bulk, b.ImageBlock, first, buf); uint64(got) != n {
				if err == nil {
					err = problem.New(problem.Integrity, "write memory", b.Name, "page %d is not there", first+uint64(got))
				}
				return err
			}
		}
		if err := putRemote(pid, mem, b.HVA+off, buf); err != nil {
			return problem.New(problem.Failed, "write memory", b.Name, "%w", gone(err))
		}
		off += size
	}
	return ctx.Err()
}

// putRemote writes all of buf. Memory that is mapped read-only (some ROMs) takes a
// write only through /proc/PID/mem.
func putRemote(pid int, mem *os.File, addr uint64, buf []byte) error {
	for len(buf) > 0 {
		n, err := writeRemote(pid, addr, buf)
		if n <= 0 {
			if err != nil && !errors.Is(err, unix.EFAULT) {
				return fmt.Errorf("process_vm_writev: %w", err)
			}
			if n, err = mem.WriteAt(buf, int64(addr)); err != nil {
				return err
			}
		}
		addr, buf = addr+uint64(n), buf[n:]
	}
	return nil
}

// gone maps the errors of a process that has ended.
func gone(err error) error {
	if errors.Is(err, pagemap.ErrGone) || errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", uffd.ErrGone, err)
	}
	return err
}
