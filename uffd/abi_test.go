package uffd

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"github.com/loopholelabs/userfaultfd-go/pkg/constants"
	"golang.org/x/sys/unix"
)

// TestAgainstUserfaultfdGo compares our constants and layouts with the C ones
// that userfaultfd-go got from the headers through cgo.
func TestAgainstUserfaultfdGo(t *testing.T) {
	for _, c := range []struct {
		name         string
		ours, theirs uint64
	}{
		{"NR_userfaultfd", unix.SYS_USERFAULTFD, constants.NR_userfaultfd},
		{"UFFD_API", apiVersion, constants.UFFD_API},
		{"UFFDIO_API", ioctlAPI, constants.UFFDIO_API},
		{"UFFDIO_REGISTER", ioctlRegister, constants.UFFDIO_REGISTER},
		{"UFFDIO_COPY", ioctlCopy, constants.UFFDIO_COPY},
		{"UFFD_EVENT_PAGEFAULT", EventPagefault, constants.UFFD_EVENT_PAGEFAULT},
		{"REGISTER_MODE_MISSING", uint64(ModeMissing), constants.UFFDIO_REGISTER_MODE_MISSING},
		{"sizeof uffd_msg", uint64(unsafe.Sizeof(Msg{})), uint64(unsafe.Sizeof(constants.UffdMsg{}))},
		{"sizeof uffdio_api", uint64(unsafe.Sizeof(apiArg{})), uint64(unsafe.Sizeof(constants.UffdioAPI{}))},
		{"sizeof uffdio_register", uint64(unsafe.Sizeof(registerArg{})), uint64(unsafe.Sizeof(constants.UffdioRegister{}))},
		{"sizeof uffdio_copy", uint64(unsafe.Sizeof(copyArg{})), uint64(unsafe.Sizeof(constants.UffdioCopy{}))},
	} {
		if c.ours != c.theirs {
			t.Errorf("%s: ours %#x, userfaultfd-go's %#x", c.name, c.ours, c.theirs)
		}
	}

	// The same message, decoded by both.
	m := Msg{Event: EventPagefault, Flags: FaultWrite | FaultWP, Address: 0x7f0012345000, ThreadID: 4711}
	theirs := *(*constants.UffdMsg)(unsafe.Pointer(&m))
	arg := constants.GetMsgArg(&theirs)
	pf := *(*constants.UffdPagefault)(unsafe.Pointer(&arg[0]))
	if got := uint64(constants.GetPagefaultAddress(&pf)); got != m.Address {
		t.Errorf("address: ours %#x, userfaultfd-go reads %#x", m.Address, got)
	}
	if got := constants.GetMsgEvent(&theirs); uint64(got) != EventPagefault {
		t.Errorf("event: userfaultfd-go reads %#x", got)
	}
}

// TestAgainstHeaders compiles a C program that prints what the installed
// linux/userfaultfd.h says. Names the header is too old for are listed as such
// and must be ones that came after Linux 6.1.
func TestAgainstHeaders(t *testing.T) {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("no gcc on this machine: the installed headers cannot be compared")
	}
	values := map[string]uint64{
		"USERFAULTFD_IOC_NEW": ioctlNew, "UFFD_API": apiVersion,
		"UFFDIO_API": ioctlAPI, "UFFDIO_REGISTER": ioctlRegister, "UFFDIO_UNREGISTER": ioctlUnregister,
		"UFFDIO_WAKE": ioctlWake, "UFFDIO_COPY": ioctlCopy, "UFFDIO_ZEROPAGE": ioctlZeroPage,
		"UFFDIO_MOVE": ioctlMove, "UFFDIO_WRITEPROTECT": ioctlWriteProtect,
		"UFFDIO_CONTINUE": ioctlContinue, "UFFDIO_POISON": ioctlPoison,
		"UFFD_EVENT_PAGEFAULT": EventPagefault, "UFFD_EVENT_FORK": EventFork, "UFFD_EVENT_REMAP": EventRemap,
		"UFFD_EVENT_REMOVE": EventRemove, "UFFD_EVENT_UNMAP": EventUnmap,
		"UFFD_PAGEFAULT_FLAG_WRITE": FaultWrite, "UFFD_PAGEFAULT_FLAG_WP": FaultWP, "UFFD_PAGEFAULT_FLAG_MINOR": FaultMinor,
		"UFFDIO_REGISTER_MODE_MISSING": uint64(ModeMissing), "UFFDIO_REGISTER_MODE_WP": uint64(ModeWP), "UFFDIO_REGISTER_MODE_MINOR": uint64(ModeMinor),
		"UFFDIO_COPY_MODE_DONTWAKE": uint64(CopyDontWake), "UFFDIO_COPY_MODE_WP": uint64(CopyWP),
		"UFFDIO_ZEROPAGE_MODE_DONTWAKE": uint64(CopyDontWake), "UFFDIO_CONTINUE_MODE_DONTWAKE": uint64(CopyDontWake),
		"UFFDIO_CONTINUE_MODE_WP":           continueModeWP,
		"UFFDIO_POISON_MODE_DONTWAKE":       uint64(CopyDontWake),
		"UFFDIO_WRITEPROTECT_MODE_WP":       wpModeWP,
		"UFFDIO_WRITEPROTECT_MODE_DONTWAKE": wpModeDontWake,
		"UFFD_USER_MODE_ONLY":               FlagUserModeOnly,
		"_UFFDIO_REGISTER":                  0, "_UFFDIO_UNREGISTER": 1, "_UFFDIO_WAKE": 2, "_UFFDIO_COPY": 3, "_UFFDIO_ZEROPAGE": 4,
		"_UFFDIO_MOVE": 5, "_UFFDIO_WRITEPROTECT": 6, "_UFFDIO_CONTINUE": 7, "_UFFDIO_POISON": 8, "_UFFDIO_API": 0x3f,
	}
	for i, n := range featureNames {
		values["UFFD_FEATURE_"+n] = 1 << i
	}
	later := map[string]bool{
		"UFFDIO_MOVE": true, "_UFFDIO_MOVE": true, "UFFDIO_POISON": true, "_UFFDIO_POISON": true,
		"UFFDIO_POISON_MODE_DONTWAKE": true, "UFFDIO_CONTINUE_MODE_WP": true,
		"UFFD_FEATURE_WP_UNPOPULATED": true, "UFFD_FEATURE_POISON": true,
		"UFFD_FEATURE_WP_ASYNC": true, "UFFD_FEATURE_MOVE": true,
	}
	layouts := map[string]any{
		"uffdio_api": apiArg{}, "uffdio_range": rangeArg{}, "uffdio_register": registerArg{}, "uffdio_copy": copyArg{},
		"uffdio_zeropage": fillArg{}, "uffdio_continue": fillArg{}, "uffdio_writeprotect": writeProtectArg{}, "uffd_msg": Msg{},
	}

	var src strings.Builder
	src.WriteString("#include <stdio.h>\n#include <stddef.h>\n#include <sys/ioctl.h>\n#include <linux/userfaultfd.h>\nint main(void){\n")
	for n := range values {
		fmt.Fprintf(&src, "#ifdef %s\nprintf(\"%s %%llu\\n\",(unsigned long long)%s);\n#endif\n", n, n, n)
	}
	for n := range layouts {
		fmt.Fprintf(&src, "printf(\"sizeof.%s %%zu\\n\",sizeof(struct %s));\n", n, n)
	}
	src.WriteString(`printf("addr %zu\n",offsetof(struct uffd_msg,arg.pagefault.address));
printf("flags %zu\n",offsetof(struct uffd_msg,arg.pagefault.flags));
printf("ptid %zu\n",offsetof(struct uffd_msg,arg.pagefault.feat.ptid));
printf("copied %zu\n",offsetof(struct uffdio_copy,copy));
return 0;}`)

	dir := t.TempDir()
	file, bin := filepath.Join(dir, "v.c"), filepath.Join(dir, "v")
	if err := os.WriteFile(file, []byte(src.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(gcc, "-w", "-o", bin, file).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	out, err := exec.Command(bin).Output()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	for line := range strings.Lines(string(out)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), " ")
		if got[k], err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	for n, want := range values {
		v, ok := got[n]
		switch {
		case !ok && !later[n]:
			t.Errorf("%s: not in the installed header, which is none of ours to explain", n)
		case !ok:
			t.Logf("%s: the installed header is too old", n)
		case v != want:
			t.Errorf("%s: ours %#x, header %#x", n, want, v)
		}
	}
	for n, l := range layouts {
		if want := uint64(reflect.TypeOf(l).Size()); got["sizeof."+n] != want {
			t.Errorf("struct %s: ours %d bytes, header %d", n, want, got["sizeof."+n])
		}
	}
	for n, want := range map[string]uintptr{
		"addr": unsafe.Offsetof(Msg{}.Address), "flags": unsafe.Offsetof(Msg{}.Flags),
		"ptid": unsafe.Offsetof(Msg{}.ThreadID), "copied": unsafe.Offsetof(copyArg{}.copied),
	} {
		if got[n] != uint64(want) {
			t.Errorf("offset of %s: ours %d, header %d", n, want, got[n])
		}
	}
}
