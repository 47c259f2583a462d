package net

import (
	"encoding/binary"
	"testing"

	"github.com/cilium/ebpf"
)

// skb is struct __sk_buff as the kernel takes it for a test run, up to ifindex.
type skb struct {
	_       [10]uint32
	Ifindex uint32
	_       [37]uint32
}

// segment is a TCP segment to be wrapped into a packet.
type segment struct {
	seq, ack uint32
	flags    byte
	window   uint16
	scale    int // of the window scale option; -1: none
	data     int
}

const (
	fin, syn, rst, ack = 1, 2, 4, 16
	vmPort, peerPort   = 80, 40000
)

func (s segment) bytes(toVM bool) []byte {
	var options []byte
	if s.scale >= 0 {
		options = []byte{2, 4, 5, 180, 1, 3, 3, byte(s.scale)}
	}
	b := make([]byte, 20, 20+len(options)+s.data)
	from, to := uint16(vmPort), uint16(peerPort)
	if toVM {
		from, to = to, from
	}
	be := binary.BigEndian
	be.PutUint16(b, from)
	be.PutUint16(b[2:], to)
	be.PutUint32(b[4:], s.seq)
	be.PutUint32(b[8:], s.ack)
	b[12] = byte(20+len(options)) / 4 << 4
	b[13] = s.flags
	be.PutUint16(b[14:], s.window)
	return append(append(b, options...), make([]byte, s.data)...)
}

// wraps are the ways a segment can be carried.
var wraps = map[string]func(tcp []byte, toVM bool) []byte{
	"IPv4":              func(b []byte, to bool) []byte { return ether(0x0800, ipv4(b, to, 0)) },
	"IPv4 with options": func(b []byte, to bool) []byte { return ether(0x0800, ipv4(b, to, 12)) },
	"IPv4, one VLAN":    func(b []byte, to bool) []byte { return ether(0x8100, tagged(0x0800, ipv4(b, to, 0))) },
	"IPv4, two VLANs": func(b []byte, to bool) []byte {
		return ether(0x88a8, tagged(0x8100, tagged(0x0800, ipv4(b, to, 4))))
	},
	"IPv6":                 func(b []byte, to bool) []byte { return ether(0x86dd, ipv6(b, to, 6, nil)) },
	"IPv6 with extensions": func(b []byte, to bool) []byte { return ether(0x86dd, ipv6(b, to, 0, []byte{60, 6})) },
	"IPv6, VLAN":           func(b []byte, to bool) []byte { return ether(0x8100, tagged(0x86dd, ipv6(b, to, 6, nil))) },
	"IPv4, padded":         func(b []byte, to bool) []byte { return append(ether(0x0800, ipv4(b, to, 0)), make([]byte, 18)...) },
}

func ether(kind uint16, payload []byte) []byte {
	return append(binary.BigEndian.AppendUint16(make([]byte, 12), kind), payload...)
}

func tagged(kind uint16, payload []byte) []byte {
	return append(binary.BigEndian.AppendUint16([]byte{0, 7}, kind), payload...)
}

func ipv4(tcp []byte, toVM bool, options int) []byte {
	b := make([]byte, 20+options)
	b[0] = 4<<4 | byte(len(b)/4)
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)+len(tcp)))
	b[9] = 6
	vm, peer := []byte{10, 0, 0, 2}, []byte{10, 0, 0, 1}
	if toVM {
		vm, peer = peer, vm
	}
	copy(b[12:], vm)
	copy(b[16:], peer)
	return append(b, tcp...)
}

// ipv6 carries tcp behind extension headers of 8 and 16 bytes, whose next fields are
// given.
func ipv6(tcp []byte, toVM bool, first byte, next []byte) []byte {
	var ext []byte
	for i, n := range next {
		h := make([]byte, 8*(i+1))
		h[0], h[1] = n, byte(i)
		ext = append(ext, h...)
	}
	b := make([]byte, 40)
	b[0], b[6] = 6<<4, first
	binary.BigEndian.PutUint16(b[4:], uint16(len(ext)+len(tcp)))
	vm, peer := 8+15, 24+15
	if toVM {
		vm, peer = peer, vm
	}
	b[vm], b[peer] = 2, 1
	return append(append(b, ext...), tcp...)
}

// play runs segments through the programs as the kernel would.
func play(t *testing.T, m *Monitor, wrap func([]byte, bool) []byte, toVM bool, s segment) {
	t.Helper()
	p := m.objs.FromVM
	if toVM {
		p = m.objs.ToVM
	}
	const next = ^uint32(0)
	ret, err := p.Run(&ebpf.RunOptions{Data: wrap(s.bytes(toVM), toVM), Context: &skb{Ifindex: 1}})
	if err != nil || ret != next {
		t.Fatalf("%+v: returned %d, %v", s, int32(ret), err)
	}
}

// TestHeaders: the same conversation is understood however it is carried.
func TestHeaders(t *testing.T) {
	m, err := Load()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer m.Close()
	for name, wrap := range wraps {
		t.Run(name, func(t *testing.T) {
			// Counted without being attached: the loopback interface is left alone.
			if err := m.objs.Devices.Update(uint32(1), &objectsDevice{Ifindex: 1}, ebpf.UpdateNoExist); err != nil {
				t.Fatal(err)
			}
			defer m.objs.Devices.Delete(uint32(1))
			in := func(s segment) { play(t, m, wrap, true, s) }
			out := func(s segment) { play(t, m, wrap, false, s) }
			check := func(what string, ok func(Traffic) bool) {
				t.Helper()
				if tr, err := m.Read(1); err != nil || !ok(tr) {
					t.Errorf("%s: %+v %v", what, tr, err)
				}
			}
			in(segment{seq: 100, flags: syn, window: 60000, scale: 7})
			out(segment{seq: 900, ack: 101, flags: syn | ack, window: 0, scale: 5}) // no stall: a SYN
			in(segment{seq: 101, ack: 901, flags: ack, window: 500, scale: -1})
			check("opened", func(x Traffic) bool { return x.Requests == 0 && x.Stalls == 0 && x.PacketsIn == 2 && x.PacketsOut == 1 })

			in(segment{seq: 101, ack: 901, flags: ack, window: 500, scale: -1, data: 40})
			check("asked", func(x Traffic) bool { return x.Requests == 1 && x.Pending == 1 })
			in(segment{seq: 101, ack: 901, flags: ack, window: 500, scale: -1, data: 40})   // again: lost on the way
			out(segment{seq: 901, ack: 141, flags: ack, window: 500, scale: -1})            // a bare acknowledgement
			out(segment{seq: 901, ack: 120, flags: ack, window: 500, scale: -1, data: 100}) // not of all of it
			check("waiting", func(x Traffic) bool { return x.Requests == 1 && x.Pending == 1 && x.Answers == 0 })
			out(segment{seq: 1001, ack: 141, flags: ack, window: 500, scale: -1, data: 100})
			out(segment{seq: 1001, ack: 141, flags: ack, window: 500, scale: -1, data: 100})
			check("answered", func(x Traffic) bool { return x.Pending == 0 && x.Answers == 1 && x.Gone == 0 })

			out(segment{seq: 1101, ack: 141, flags: ack, window: 10, scale: -1}) // 320 bytes: closed
			check("stalled", func(x Traffic) bool { return x.Stalls == 1 && x.Stalled == 1 })
			out(segment{seq: 1101, ack: 141, flags: ack, window: 60, scale: -1}) // 1920: in between
			out(segment{seq: 1101, ack: 141, flags: ack, window: 20, scale: -1})
			check("still stalled", func(x Traffic) bool { return x.Stalls == 1 && x.Stalled == 1 && x.Resumed == 0 })
			out(segment{seq: 1101, ack: 141, flags: ack, window: 200, scale: -1})
			in(segment{seq: 141, ack: 1101, flags: ack, window: 12, scale: -1}) // 1536 at the peer's scale: open
			check("open", func(x Traffic) bool { return x.Stalled == 0 && x.Resumed == 1 && x.Stalls == 1 })

			in(segment{seq: 141, ack: 1101, flags: ack, window: 500, scale: -1, data: 10})
			out(segment{seq: 1101, flags: rst, scale: -1})
			check("reset", func(x Traffic) bool { return x.Pending == 0 && x.Gone == 1 && x.Requests == 2 })
			in(segment{seq: 5, flags: rst, scale: -1}) // of nothing known

			// Attached in the middle: the scale is unknown, zero is closed.
			in(segment{seq: 7000, ack: 1, flags: ack, window: 3, scale: -1})
			check("unknown scale", func(x Traffic) bool { return x.Stalls == 1 })
			in(segment{seq: 7000, ack: 1, flags: ack, window: 0, scale: -1})
			check("zero window", func(x Traffic) bool { return x.Stalls == 2 && x.Stalled == 1 })
			in(segment{seq: 7000, ack: 1, flags: rst, scale: -1})
			check("gone", func(x Traffic) bool { return x.Stalled == 0 })
		})
	}
}

// TestRubbish: whatever comes, the packet goes on.
func TestRubbish(t *testing.T) {
	m, err := Load()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer m.Close()
	if err := m.objs.Devices.Update(uint32(1), &objectsDevice{Ifindex: 1}, ebpf.UpdateNoExist); err != nil {
		t.Fatal(err)
	}
	whole := wraps["IPv6 with extensions"](segment{flags: syn, scale: 9, data: 5}.bytes(true), true)
	// The kernel's test runner wants a whole IP header for what calls itself IP.
	for n := 54; n < len(whole); n++ {
		for i := range 8 {
			b := append([]byte(nil), whole[:n]...)
			if i > 0 {
				b[12+(n*i)%(n-12)] ^= byte(i * 37)
			}
			ret, err := m.objs.ToVM.Run(&ebpf.RunOptions{Data: b, Context: &skb{Ifindex: 1}})
			if err != nil || ret != ^uint32(0) {
				t.Fatalf("%d bytes: returned %d, %v", n, int32(ret), err)
			}
		}
	}
	if tr, err := m.Read(1); err != nil || tr.Pending < 0 || tr.Stalled < 0 || tr.PacketsIn == 0 {
		t.Errorf("%+v %v", tr, err)
	}
}
