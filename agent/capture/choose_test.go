package capture

import (
	"errors"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm"
)

func TestChooseMode(t *testing.T) {
	anon := vm.RAMBlock{Name: "pc.ram", PageBytes: 4096, Backing: vm.Anonymous}
	disk := vm.RAMBlock{Name: "ram0", PageBytes: 4096, Backing: vm.PrivateFile, FileType: "ext4"}
	huge := vm.RAMBlock{Name: "huge", PageBytes: 2 << 20, Backing: vm.Hugetlb}
	gigantic := vm.RAMBlock{Name: "gigantic", PageBytes: 1 << 30, Backing: vm.Hugetlb}
	old := errors.New("this kernel lacks it")
	for _, c := range []struct {
		name   string
		blocks []vm.RAMBlock
		asked  Mode
		lacks  error
		mode   Mode // "" if refused
		says   string
	}{
		{"auto", []vm.RAMBlock{anon}, Auto, nil, COW, ""},
		{"cow", []vm.RAMBlock{anon}, COW, nil, COW, ""},
		{"stop", []vm.RAMBlock{anon}, Stop, nil, Stop, ""},
		{"auto, old kernel", []vm.RAMBlock{anon}, Auto, old, Stop, "this kernel lacks it"},
		{"cow, old kernel", []vm.RAMBlock{anon}, COW, old, "", "this kernel lacks it (use mode buffer or stop"},
		{"buffer, old kernel", []vm.RAMBlock{anon}, Buffer, old, Buffer, ""},
		{"auto, disk file", []vm.RAMBlock{anon, disk}, Auto, nil, Stop, "RAMBlock ram0 cannot be write-protected: its file is on ext4"},
		{"cow, disk file", []vm.RAMBlock{anon, disk}, COW, nil, "", "RAMBlock ram0: cannot be write-protected: its file is on ext4"},
		{"auto, both", []vm.RAMBlock{disk}, Auto, old, Stop, "this kernel lacks it"},
		{"auto, huge pages", []vm.RAMBlock{huge}, Auto, nil, COW, ""},
		{"auto, huge pages, old kernel", []vm.RAMBlock{huge}, Auto, old, Stop, "this kernel lacks it"},
		{"stop, gigantic pages", []vm.RAMBlock{gigantic}, Stop, nil, "", "its pages are 1073741824 bytes"},
	} {
		mode, why, err := chooseMode(c.blocks, c.asked, c.lacks)
		if mode != c.mode || err != nil && !problem.Is(err, problem.Refused) || (err != nil) != (c.mode == "") {
			t.Errorf("%s: %q, %v", c.name, mode, err)
			continue
		}
		if err != nil {
			why = err.Error()
		}
		if c.says == "" && why != "" || !strings.Contains(why, c.says) {
			t.Errorf("%s: %q, want %q", c.name, why, c.says)
		}
	}
}
