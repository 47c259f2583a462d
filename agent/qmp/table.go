package qmp

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"strconv"
	"strings"
)

// unixSocket is a line of /proc/PID/net/unix.
type unixSocket struct {
	inode     uint64
	listening bool
	connected bool
	path      string // "@name" if abstract, NULs shown as "@"
}

const soAcceptCon = 0x10000 // __SO_ACCEPTCON of include/uapi/linux/net.h

// parseUnixTable reads /proc/PID/net/unix; lines it does not understand are
// left out.
func parseUnixTable(b []byte) []unixSocket {
	var table []unixSocket
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		// Num RefCount Protocol Flags Type St Inode [Path]; the path may
		// contain spaces.
		line := sc.Text()
		var f [7]string
		ok := true
		for i := range f {
			line = strings.TrimLeft(line, " ")
			if f[i], line, _ = strings.Cut(line, " "); f[i] == "" {
				ok = false
				break
			}
		}
		if !ok {
			continue
		}
		flags, err1 := strconv.ParseUint(f[3], 16, 32)
		kind, err2 := strconv.ParseUint(f[4], 16, 16)
		inode, err3 := strconv.ParseUint(f[6], 10, 64)
		if err1 != nil || err2 != nil || err3 != nil || kind != 1 { // SOCK_STREAM
			continue
		}
		table = append(table, unixSocket{
			inode:     inode,
			listening: flags&soAcceptCon != 0,
			connected: f[5] == "03", // SS_CONNECTED
			path:      line,
		})
	}
	return table
}

// tcpSocket is a line of /proc/PID/net/tcp or tcp6.
type tcpSocket struct {
	inode         uint64
	local, remote netip.AddrPort
	state         uint64
}

const (
	tcpEstablished = 1
	tcpListen      = 10
)

func parseTCPTable(b []byte) []tcpSocket {
	var table []tcpSocket
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 10 {
			continue
		}
		local, ok1 := procAddr(f[1])
		remote, ok2 := procAddr(f[2])
		state, err1 := strconv.ParseUint(f[3], 16, 8)
		inode, err2 := strconv.ParseUint(f[9], 10, 64)
		if !ok1 || !ok2 || err1 != nil || err2 != nil {
			continue
		}
		table = append(table, tcpSocket{inode, local, remote, state})
	}
	return table
}

// procAddr reads "0100007F:1F90": 32-bit words in the host's byte order.
func procAddr(s string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(s, ":")
	raw, err := hex.DecodeString(host)
	if !ok || err != nil || len(raw) != 4 && len(raw) != 16 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	addr, _ := netip.AddrFromSlice(raw)
	p, err := strconv.ParseUint(port, 16, 16)
	return netip.AddrPortFrom(addr.Unmap(), uint16(p)), err == nil
}

// tableTries is how often a socket that must be there is looked for: the
// kernel's tables skip lines when sockets come and go while they are read.
const tableTries = 4

func unixTable(pid int) ([]unixSocket, error) {
	b, err := readProc(pid, "net", "unix")
	if err != nil {
		return nil, err
	}
	return parseUnixTable(b), nil
}

func tcpTable(pid int) ([]tcpSocket, error) {
	b, err := readProc(pid, "net", "tcp")
	if err != nil {
		return nil, err
	}
	table := parseTCPTable(b)
	if b, err := readProc(pid, "net", "tcp6"); err == nil { // absent without IPv6
		table = append(table, parseTCPTable(b)...)
	}
	return table, nil
}
