package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestKernelLog(t *testing.T) {
	type read struct {
		record string
		err    error
		more   bool
	}
	message := func(text string) read { return read{record: "4,1,2,-;" + text + "\n", more: true} }
	overwritten := read{err: unix.EPIPE, more: true}
	end := read{err: unix.EAGAIN}
	for _, test := range []struct {
		name  string
		reads []read
		want  []string
	}{
		{"nothing", []read{end}, nil},
		{"well", []read{message("usb 1-1: new"), {err: unix.EINTR, more: true}, message("x"), end}, nil},
		{"a bug and what follows", []read{message("before"), message("BUG: x"), message("stack"), end}, []string{"BUG: x", "stack"}},
		{"of a program", []read{{record: "12,1,2,-;BUG: x\n", more: true}, end}, nil},
		{"overwritten", []read{overwritten, message("after"), end}, []string{"vm: the kernel has overwritten messages before they were read", "after"}},
		{"cannot be read", []read{{err: unix.EINVAL}}, []string{"vm: read /dev/kmsg: invalid argument"}},
	} {
		var k kernelLog
		for _, r := range test.reads {
			if more := k.add([]byte(r.record), r.err); more != r.more {
				t.Errorf("%s: after %q, %v: more %v", test.name, r.record, r.err, more)
			}
		}
		if !slices.Equal(k.bad, test.want) {
			t.Errorf("%s: bad is %q, want %q", test.name, k.bad, test.want)
		}
	}
	var k kernelLog
	for range 1000 {
		k.add([]byte("4,1,2,-;BUG: x\n"), nil)
	}
	if len(k.bad) != 100 {
		t.Errorf("%d messages are kept", len(k.bad))
	}
}

func TestTaint(t *testing.T) {
	name := filepath.Join(t.TempDir(), "tainted")
	k := kernelLog{taint: 1 << 9}
	for _, test := range []struct {
		text string
		bad  bool
	}{
		{"0\n", false},
		{"512\n", false}, // as it was
		{"4\n", false},   // a processor out of specification
		{"644\n", true},  // and a die
		{"644\n", false}, // told once
		{"32\n", true},
		{"16384\n", true},
		{"x\n", true},
	} {
		if err := os.WriteFile(name, []byte(test.text), 0o600); err != nil {
			t.Fatal(err)
		}
		k.bad = nil
		k.checkTaint(name)
		if bad := len(k.bad) > 0; bad != test.bad {
			t.Errorf("%q: %q", test.text, k.bad)
		}
	}
	k = kernelLog{bad: []string{"WARNING: x"}}
	os.WriteFile(name, []byte("512\n"), 0o600)
	if k.checkTaint(name); len(k.bad) != 1 || k.taint != 512 {
		t.Errorf("beside the message: %q, %d", k.bad, k.taint)
	}
	k.bad = nil
	if k.checkTaint(filepath.Join(t.TempDir(), "none")); len(k.bad) != 1 {
		t.Errorf("without the file: %q", k.bad)
	}
}
