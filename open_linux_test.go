package uffd_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

const deviceNode = "/dev/userfaultfd"

// TestOpen opens with the rights that the test happens to run with.
func TestOpen(t *testing.T) {
	for _, faults := range []uffd.Faults{uffd.BestFaults, uffd.AllFaults, uffd.UserFaults} {
		t.Run(faults.String(), func(t *testing.T) {
			switch faults {
			case uffd.AllFaults:
				uffdtest.RequireAllFaults(t)
			case uffd.UserFaults:
				uffdtest.RequireUserFaults(t)
			}
			f := open(t, &uffd.Config{Faults: faults})
			only, known := f.UserModeOnly()
			if !known {
				t.Error("unknown whether user mode only")
			}
			if faults != uffd.BestFaults && only != (faults == uffd.UserFaults) {
				t.Errorf("user mode only: %v", only)
			}
		})
	}
}

func TestOpenDevice(t *testing.T) {
	uffdtest.RequireRoot(t)
	uffdtest.RequireFile(t, deviceNode, "6.1")
	dev, err := os.Open(deviceNode)
	if err != nil {
		t.Fatal(err)
	}
	for _, faults := range []uffd.Faults{uffd.BestFaults, uffd.AllFaults, uffd.UserFaults} {
		f, err := uffd.OpenDevice(dev, faults)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if only, known := f.UserModeOnly(); only != (faults == uffd.UserFaults) || !known {
			t.Errorf("%v: user mode only: %v, %v", faults, only, known)
		}
		if _, _, err := f.API(0); err != nil {
			t.Error(err)
		}
	}
	dev.Close()
	if _, err := uffd.OpenDevice(dev, uffd.AllFaults); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a closed file: %v", err)
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	_, err = uffd.OpenDevice(null, uffd.AllFaults)
	var open *uffd.OpenError
	if !errors.As(err, &open) || !errors.Is(err, unix.ENOTTY) || !strings.Contains(err.Error(), deviceNode) {
		t.Errorf("another device: %v", err)
	}
}

// opened is what a process without privilege got.
type opened struct {
	UserModeOnly bool
	Features     uffd.Features
	Error        string
	Permission   bool // errors.Is(err, fs.ErrPermission)
	Attempts     []string
}

// openRole opens a userfaultfd in a process of its own and prints what it got.
func openRole() error {
	var config uffd.Config
	fmt.Sscan(os.Getenv("UFFD_TEST_OPEN"), &config.Faults, &config.Prefer)
	var f *uffd.File
	var err error
	if os.Getenv("UFFD_TEST_DEVICE") != "" {
		if f, err = uffd.OpenDevice(os.NewFile(3, "device"), config.Faults); err == nil {
			_, _, err = f.API(0)
		}
	} else {
		f, err = uffd.New(&config)
	}
	var got opened
	if err != nil {
		got.Error, got.Permission = err.Error(), errors.Is(err, fs.ErrPermission)
		var open *uffd.OpenError
		if errors.As(err, &open) {
			for _, a := range open.Attempts {
				got.Attempts = append(got.Attempts, a.Way)
			}
		}
	} else {
		got.UserModeOnly, _ = f.UserModeOnly()
		got.Features = f.Features()
	}
	return json.NewEncoder(os.Stdout).Encode(got)
}

// openAsNobody runs openRole as a user without privilege.
func openAsNobody(t *testing.T, faults uffd.Faults, prefer uffd.Features, device *os.File) opened {
	t.Helper()
	cmd := uffdtest.Command("open", fmt.Sprintf("UFFD_TEST_OPEN=%d %d", faults, prefer))
	const nobody = 65534
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if device != nil {
		cmd.Env = append(cmd.Env, "UFFD_TEST_DEVICE=1")
		cmd.ExtraFiles = []*os.File{device}
	}
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var got opened
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return got
}

// TestUnprivileged opens as a user without privilege, with each setting of the
// system that decides.
func TestUnprivileged(t *testing.T) {
	uffdtest.RequireRoot(t)
	uffdtest.RequireUserFaults(t) // and with them the sysctl's meaning
	settings := uffdtest.LockSettings(t)
	const sysctl = "/proc/sys/vm/unprivileged_userfaultfd"

	settings.Set(sysctl, "0")
	if got := openAsNobody(t, uffd.BestFaults, 0, nil); got.Error != "" || !got.UserModeOnly {
		t.Errorf("BestFaults with the sysctl at 0: %+v, want user mode only", got)
	}
	if got := openAsNobody(t, uffd.UserFaults, 0, nil); got.Error != "" || !got.UserModeOnly {
		t.Errorf("UserFaults with the sysctl at 0: %+v", got)
	}
	got := openAsNobody(t, uffd.AllFaults, 0, nil)
	if !got.Permission || strings.Join(got.Attempts, " ") != deviceNode+" userfaultfd(0)" {
		t.Errorf("AllFaults with the sysctl at 0: %+v", got)
	}
	for _, remedy := range []string{"CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd", deviceNode, "UserFaults"} {
		if !strings.Contains(got.Error, remedy) {
			t.Errorf("%q does not name %s", got.Error, remedy)
		}
	}
	if dev, err := os.Open(deviceNode); err == nil {
		if got := openAsNobody(t, uffd.BestFaults, 0, dev); got.Error != "" || got.UserModeOnly {
			t.Errorf("with an open device: %+v, want all faults", got)
		}
		dev.Close()
	}

	settings.Set(sysctl, "1")
	if got := openAsNobody(t, uffd.AllFaults, 0, nil); got.Error != "" || got.UserModeOnly {
		t.Errorf("AllFaults with the sysctl at 1: %+v", got)
	}
	// EVENT_FORK is dropped, what else is preferred stays.
	prefer := uffd.FeatureEventFork | uffd.FeatureEventRemove
	if got := openAsNobody(t, uffd.BestFaults, prefer, nil); got.Error != "" || got.Features != uffd.FeatureEventRemove {
		t.Errorf("preferring %v: %+v", prefer, got)
	}
}

// With access to the device only, the device is the way.
func TestDeviceOnly(t *testing.T) {
	uffdtest.RequireRoot(t)
	uffdtest.RequireFile(t, deviceNode, "6.1")
	settings := uffdtest.LockSettings(t)
	settings.Set("/proc/sys/vm/unprivileged_userfaultfd", "0")
	settings.Chmod(deviceNode, 0o666)
	if got := openAsNobody(t, uffd.BestFaults, 0, nil); got.Error != "" || got.UserModeOnly {
		t.Errorf("BestFaults: %+v, want all faults", got)
	}
}

// A process that may not even make the system call is told so.
func TestForbiddenByLimit(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	open(t, nil) // what Go opens for itself comes first
	low := unix.Rlimit{Cur: 3, Max: limit.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	f, err := uffd.New(nil)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err == nil {
		f.Close()
	}
	var open *uffd.OpenError
	if !errors.As(err, &open) || !errors.Is(err, unix.EMFILE) || !strings.Contains(err.Error(), "raise the limit") {
		t.Errorf("without descriptors: %v", err)
	}
}
