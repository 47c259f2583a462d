package pager

import (
	"context"
	"encoding/json"

	"github.com/ckagent/ckagent/restore/pager/order"
)

// PageBytes is the page size served. Huge page backings are not served lazily.
const PageBytes = 4096

// Run is a row of pages of one block of the source.
type Run = order.Run

// Class tells a source how urgent a read is.
type Class uint8

const (
	Demand Class = iota // a guest thread waits: one page, lowest latency
	Ahead               // probably wanted soon
	Bulk                // the drain: throughput matters, latency does not
)

// PageSource is where pages come from: a local image, or memory servers. Methods
// are called by many goroutines at once; Close comes after all others returned.
//
// What it hands out has been verified against the checkpoint's checksums: the
// pager maps it into the guest without a further look.
type PageSource interface {
	// Blocks is how many pages each block has, by the block's number.
	Blocks() []uint64
	// Extent says whether page first is recorded as all zero, and how many pages
	// from it on (1 to limit) are recorded alike. It must not block: a source
	// knows its page map.
	Extent(block int, first, limit uint64) (zero bool, pages uint64, err error)
	// ReadRun fills dst, whole pages, with the content of the pages from first
	// on and returns how many leading pages are there and verified; if that is
	// not all, err says why the next one is not. The rest of dst is undefined.
	// A *problem.Error of code Integrity means the content is wrong for good;
	// any other error may pass.
	ReadRun(ctx context.Context, class Class, block int, first uint64, dst []byte) (pages int, err error)
	// Hot lists the pages to bring in first, most important first.
	Hot() []Run
	Close() error
}

// SourceSpec names a kind of source and how to open it; it travels to the worker
// process and is kept in the run directory.
type SourceSpec struct {
	Kind   string          `json:"kind"`
	Params json.RawMessage `json:"params,omitempty"`
}

// Opener opens a source from its parameters.
type Opener func(ctx context.Context, params json.RawMessage) (PageSource, error)
