package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-uffd/uffd/internal/vm"
	"github.com/go-uffd/uffd/internal/vm/job"
)

// Variables that make this program a QEMU, whose guest lives the life of that
// name and boots that kernel.
const (
	lifeVariable   = "UFFD_FAKE_QEMU"
	kernelVariable = "UFFD_FAKE_KERNEL"
)

func TestMain(m *testing.M) {
	if life := os.Getenv(lifeVariable); life != "" {
		if err := fakeQEMU(life); err != nil {
			fmt.Fprintln(os.Stderr, "fake QEMU:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func fakeQEMU(life string) error {
	after := func(flag string) string { return os.Args[slices.Index(os.Args, flag)+1] }
	if got, want := after("-kernel"), os.Getenv(kernelVariable); got != want {
		return fmt.Errorf("kernel %q, want %q", got, want)
	}
	initramfs, err := os.ReadFile(after("-initrd"))
	if err != nil {
		return err
	}
	_, rest, ok := bytes.Cut(initramfs, []byte(`{"Nonce":"`))
	nonce, _, ended := bytes.Cut(rest, []byte(`"`))
	if !ok || !ended || !bytes.Contains(initramfs, []byte("the program")) {
		return fmt.Errorf("the initramfs lacks the job or the program")
	}
	send := func(events ...job.Event) {
		for _, e := range events {
			line, err := job.Encode(string(nonce), e)
			if err != nil {
				panic(err)
			}
			os.Stdout.Write(line)
		}
	}
	exit := func(e job.Exit) { send(job.Event{Exit: &e}, job.Event{Done: true}) }
	say := func(s string) { os.Stdout.WriteString(s) }
	forever := func() { io.Copy(io.Discard, os.Stdin); time.Sleep(time.Hour) }

	say("firmware\n")
	if life == "no boot" {
		forever()
	}
	send(job.Event{Boot: &job.Boot{Release: "7.3"}}, job.Event{Start: &job.Start{}})
	say("output\n")
	switch life {
	case "well":
		exit(job.Exit{})
	case "status":
		exit(job.Exit{Code: 3})
	case "kernel bug":
		exit(job.Exit{KernelLog: []string{"WARNING: at mm/x.c", "stack"}})
	case "program's limit":
		exit(job.Exit{Code: 2, TimedOut: true})
	case "program's limit, status 0":
		exit(job.Exit{TimedOut: true})
	case "guest's error":
		send(job.Event{Error: "mount /proc: no"})
	case "guest's error after the program":
		send(job.Event{Exit: &job.Exit{}}, job.Event{Error: "a process left behind cannot be killed"})
	case "panic":
		say("[1.0] Kernel panic - not syncing: x\n")
	case "reset":
	case "killed":
		return fmt.Errorf("out of memory")
	case "hang":
		forever()
	case "hang after the program":
		send(job.Event{Exit: &job.Exit{}})
		forever()
	default:
		panic(life)
	}
	return nil
}

// TestRun has every end of a guest tell itself apart, with a kernel of one's own.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(dir, "qemu-system-x86_64")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	program, kernel := filepath.Join(dir, "x.test"), filepath.Join(dir, "vmlinuz")
	if err := os.WriteFile(program, []byte("the program"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv(kernelVariable, kernel)
	for life, want := range map[string]struct {
		code int
		says string        // "": no error
		boot time.Duration // limit; 0 is the usual one
		run  time.Duration
	}{
		"well":                            {code: 0},
		"status":                          {code: 3},
		"kernel bug":                      {code: exitKernel, says: "WARNING: at mm/x.c\nstack"},
		"program's limit":                 {code: exitTimeout, says: "time limit"},
		"program's limit, status 0":       {code: exitTimeout, says: "time limit"},
		"guest's error":                   {code: exitSetup, says: "mount /proc: no"},
		"guest's error after the program": {code: exitSetup, says: "cannot be killed"},
		"panic":                           {code: exitPanic, says: vm.ErrPanic.Error()},
		"reset":                           {code: exitNoMarker, says: vm.ErrNoMarker.Error()},
		"killed":                          {code: exitNoMarker, says: "out of memory"},
		"no boot":                         {code: exitTimeout, says: "no sign of PID 1", boot: time.Second},
		"hang":                            {code: exitTimeout, says: "no end marker", run: time.Second},
		"hang after the program":          {code: exitTimeout, says: "no end marker", run: time.Second},
	} {
		t.Run(life, func(t *testing.T) {
			t.Setenv(lifeVariable, life)
			o := &options{arch: "amd64", vmlinuz: kernel, limit: time.Minute}
			o.config.BootLimit = want.boot
			if want.run != 0 {
				o.limit = want.run - 90*time.Second // what the guest is given beyond it
			}
			code, err := o.run(context.Background(), []string{program})
			if code != want.code {
				t.Errorf("exit status %d, want %d", code, want.code)
			}
			if want.says == "" && err != nil || want.says != "" && (err == nil || !strings.Contains(err.Error(), want.says)) {
				t.Errorf("error %v, want one that says %q", err, want.says)
			}
		})
	}
	t.Run("interrupt", func(t *testing.T) {
		t.Setenv(lifeVariable, "hang")
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		o := &options{arch: "amd64", vmlinuz: kernel, limit: time.Minute}
		code, err := o.run(ctx, []string{program})
		if code != exitSetup || err == nil {
			t.Errorf("exit status %d, %v; want %d and an error", code, err, exitSetup)
		}
	})
}
