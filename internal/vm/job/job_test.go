package job

import (
	"bytes"
	"reflect"
	"testing"
)

func TestEncodeDecode(t *testing.T) {
	events := []Event{
		{Boot: &Boot{Release: "7.3.4+deb13-cloud-amd64", Machine: "x86_64", PageSize: 4096, Features: 0x7ffff}},
		{Start: &Start{Program: 2}},
		{Exit: &Exit{Program: 2, Code: 137, TimedOut: true, Elapsed: 5, KernelLog: []string{"BUG: <x>", ""}}},
		{File: &File{Path: "/out/c", Data: []byte{0, '\n', '>', 255}}},
		{Error: "no"},
		{Done: true},
	}
	for _, want := range events {
		line, err := Encode("n", want)
		if err != nil {
			t.Fatal(err)
		}
		if n := bytes.IndexByte(line, '\n'); n != len(line)-1 {
			t.Errorf("%q is not one line", line)
		}
		for _, before := range []string{"", "--- PA", "<vm "} {
			output, got, err := Decode("n", append([]byte(before), line...))
			if err != nil || got == nil || !reflect.DeepEqual(*got, want) || string(output) != before {
				t.Errorf("after %q: %q, %+v, %v, want %+v", before, output, got, err, want)
			}
		}
	}
}

func TestDecodeOther(t *testing.T) {
	for _, line := range []string{"", "\n", "text\n", "<vm other e30=>\n"} {
		output, e, err := Decode("n", []byte(line))
		if string(output) != line || e != nil || err != nil {
			t.Errorf("%q: %q, %v, %v", line, output, e, err)
		}
	}
	for _, line := range []string{"<vm n e30=\n", "<vm n !!>\n", "<vm n e30>\n", "<vm n bm8=>\n"} {
		if _, e, err := Decode("n", []byte(line)); err == nil {
			t.Errorf("%q: %v without an error", line, e)
		}
	}
}

func TestKernelMessage(t *testing.T) {
	for _, test := range []struct {
		record, text string
		ok           bool
	}{
		{"4,339,5140900,-;WARNING: CPU: 0 PID: 1 at mm/x.c:3 f\n SUBSYSTEM=acpi\n", "WARNING: CPU: 0 PID: 1 at mm/x.c:3 f", true},
		{"0,1,2,c;a;b\n", "a;b", true},
		{"12,339,5140900,-;WARNING: written by a program\n", "WARNING: written by a program", false},
		{"garbage", "", false},
		{"x,1,2;t", "t", false},
	} {
		text, ok := KernelMessage(test.record)
		if text != test.text || ok != test.ok {
			t.Errorf("%q: %q, %v", test.record, text, ok)
		}
	}
}

func TestIsKernelBug(t *testing.T) {
	for text, want := range map[string]bool{
		"------------[ cut here ]------------":                                  true,
		"WARNING: CPU: 1 PID: 7 at mm/memory.c:1 f+0x1/0x2":                     true,
		"WARNING: mm/userfaultfd.c:1 at f+0x1/0x2, CPU#0: x/7":                  true,
		"BUG: unable to handle page fault for address: ffff":                    true,
		"BUG: Bad rss-counter state mm:00000000 type:MM_ANONPAGES val:1":        true,
		"kernel BUG at mm/hugetlb.c:5000!":                                      true,
		"Oops: 0000 [#1] PREEMPT SMP":                                           true,
		"Internal error: Oops: 96000004 [#1] SMP":                               true,
		"general protection fault, probably for non-canonical address":          true,
		"watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [x:7]":               true,
		"Kernel bug detected[#1]:":                                              true, // mips
		"invalid opcode: 0000 [#1] SMP":                                         true,
		"illegal operation: 0001 ilc:1 [#2] SMP ":                               true, // s390
		"traps: x[7] general protection fault ip:1 sp:2 error:0 in x":           false,
		"Spectre V2 : WARNING: Unprivileged eBPF is enabled":                    false,
		"x[7]: segfault at 0 ip 0 sp 0 error 4":                                 false,
		"MCE: Killing x:7 due to hardware memory corruption fault at 7f0000000": false,
		"mmap: x (7): VmData 1 exceed data ulimit 0":                            false,
	} {
		if got := IsKernelBug(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
