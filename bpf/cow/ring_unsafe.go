package cow

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// reader consumes a BPF ring buffer where it lies: the library's reader copies each
// record and waits in the Go scheduler, and neither is for a thread that stands between
// a guest and a full ring. The layout is the kernel's user-space ABI: a page with the
// consumer's position, a page with the producer's, the data twice in a row.
type reader struct {
	consumerPage []byte
	producerPage []byte // and the data behind it
	consumer     *uint64
	producer     *uint64
	data         []byte
	mask         uint64
	at           uint64 // the consumer's position
	next         uint64 // after the record that Next returned
}

const (
	recordHeader  = 8
	recordBusy    = 1 << 31
	recordDiscard = 1 << 30
)

// label and record are the structures of cow.bpf.c.
type label struct{ page, epoch uint64 }

type record struct {
	of   label
	data [PageBytes]byte
}

func newReader(fd, bytes int) (*reader, error) {
	r := &reader{mask: uint64(bytes) - 1}
	var err error
	if r.consumerPage, err = unix.Mmap(fd, 0, PageBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map the ring: %w", err)
	}
	if r.producerPage, err = unix.Mmap(fd, PageBytes, PageBytes+2*bytes, unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return nil, errors.Join(fmt.Errorf("map the ring's data: %w", err), unix.Munmap(r.consumerPage))
	}
	r.consumer = (*uint64)(unsafe.Pointer(&r.consumerPage[0]))
	r.producer = (*uint64)(unsafe.Pointer(&r.producerPage[0]))
	r.data = r.producerPage[PageBytes:]
	r.at = atomic.LoadUint64(r.consumer)
	r.next = r.at
	return r, nil
}

func (r *reader) close() error {
	return errors.Join(unix.Munmap(r.consumerPage), unix.Munmap(r.producerPage))
}

// Record is a page as it was before it was written. Data lies in the ring until
// Advance; it is nil if nobody had touched the page: it held zeros.
type Record struct {
	Page  uint64
	Epoch uint64
	Data  []byte
}

// Next returns the oldest record, or false if there is none, or if an older one is
// still being written. Records come in the order in which their room was taken.
func (p *Programs) Next() (Record, bool) {
	r := p.ring
	for r.at < atomic.LoadUint64(r.producer) {
		header := atomic.LoadUint32((*uint32)(unsafe.Pointer(&r.data[r.at&r.mask])))
		if header&recordBusy != 0 {
			return Record{}, false
		}
		length := uint64(header &^ (recordBusy | recordDiscard))
		r.next = r.at + (recordHeader+length+7)&^7
		if header&recordDiscard != 0 {
			p.Advance()
			continue
		}
		at := unsafe.Pointer(&r.data[r.at&r.mask+recordHeader])
		of := (*label)(at)
		rec := Record{Page: of.page, Epoch: of.epoch}
		if length > uint64(unsafe.Sizeof(*of)) {
			rec.Data = (*record)(at).data[:]
		}
		return rec, true
	}
	return Record{}, false
}

// Advance gives the room of the record that Next returned back.
func (p *Programs) Advance() {
	p.ring.at = p.ring.next
	atomic.StoreUint64(p.ring.consumer, p.ring.at)
}

// Mark is a position in the ring: everything whose room has been taken so far.
func (p *Programs) Mark() uint64 { return atomic.LoadUint64(p.ring.producer) }

// Behind reports whether a record from before the mark is still to be read.
func (p *Programs) Behind(mark uint64) bool { return p.ring.at < mark }

// Waiting is how many bytes of records wait in the ring.
func (p *Programs) Waiting() uint64 { return p.Mark() - p.ring.at }
