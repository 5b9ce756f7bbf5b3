package lazymem_test

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/lazymem"
	"github.com/go-uffd/uffd/source"
)

// child returns a command that is one of children.
func child(name string, env ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childVariable+"="+name)
	cmd.Env = append(cmd.Env, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // some would hang for ever
	return cmd
}

// What Do cannot protect ends the program, and does not read zeros.
func TestHazards(t *testing.T) {
	const elsewhere, locked = "unexpected fault address", "unexpected signal during runtime execution"
	for hazard, message := range map[string]string{
		"goroutine":        elsewhere,
		"iter.Pull":        elsewhere,
		"kept":             elsewhere,
		"kept after Close": elsewhere,
		"println":          locked,
	} {
		t.Run(hazard, func(t *testing.T) {
			out, err := child("hazard", "LAZYMEM_TEST_HAZARD="+hazard).CombinedOutput()
			if err == nil || !strings.Contains(string(out), message) || strings.Contains(string(out), "survived") {
				t.Errorf("the child ended with %v:\n%s", err, out)
			}
		})
	}
}

func hazardChild() error {
	m, err := lazymem.New(counted(pattern(1<<20)), nil)
	if err != nil {
		return err
	}
	var kept []byte
	switch os.Getenv("LAZYMEM_TEST_HAZARD") {
	case "goroutine":
		m.Do(func(mem []byte) error {
			var group sync.WaitGroup
			group.Go(func() { sink = mem[0] })
			group.Wait()
			fmt.Println("survived")
			return nil
		})
	case "iter.Pull":
		m.Do(func(mem []byte) error {
			next, stop := iter.Pull(slices.Values(mem))
			defer stop()
			sink, _ = next()
			fmt.Println("survived")
			return nil
		})
	case "println":
		m.Do(func(mem []byte) error {
			println(unsafe.String(&mem[0], 10))
			fmt.Println("survived")
			return nil
		})
	case "kept":
		m.Do(func(mem []byte) error { kept = mem; return nil })
	case "kept after Close":
		m.Do(func(mem []byte) error { kept = mem; sink = mem[0]; return nil })
		m.Close()
	}
	fmt.Println("survived", kept[0])
	runtime.KeepAlive(m)
	return nil
}

// The addresses of closed memory are free when nobody holds it any more.
func TestCleanup(t *testing.T) {
	if out, err := child("cleanup").CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func cleanupChild() error {
	count, size := 100, 1<<30
	if strconv.IntSize == 32 {
		count, size = 6, 1<<28
	}
	start := mapped()
	for range count {
		m, err := lazymem.New(source.Zero(int64(size)), nil)
		if err == nil {
			err = m.Close()
		}
		if err != nil {
			return err
		}
	}
	for deadline := time.Now().Add(uffdtest.Patience); mapped() > start+size/2; {
		if time.Now().After(deadline) {
			return fmt.Errorf("%d MiB are still mapped after %d were closed", (mapped()-start)>>20, count)
		}
		runtime.GC()
		time.Sleep(time.Millisecond)
	}
	return nil
}

// mapped returns how many bytes the process has mapped.
func mapped() (n int) {
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		panic(err)
	}
	fmt.Sscan(string(statm), &n)
	return n * pageSize
}

// mlockall with MCL_FUTURE fills new mappings at once, but not ours with zeros.
func TestMlockall(t *testing.T) {
	uffdtest.RequireRoot(t)
	if out, err := child("mlockall").CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func mlockallChild() error {
	if err := unix.Mlockall(unix.MCL_FUTURE); err != nil {
		return err
	}
	return useMemory(true)
}

// Without privilege, and with vm.unprivileged_userfaultfd at 0, all works as ever.
func TestUnprivileged(t *testing.T) {
	uffdtest.RequireRoot(t) // others are unprivileged anyway
	uffdtest.RequireUserFaults(t)
	uffdtest.LockSettings(t).Set("/proc/sys/vm/unprivileged_userfaultfd", "0")
	cmd := child("unpriv")
	const nobody = 65534
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func unprivilegedChild() error { return useMemory(false) }

// useMemory reads, discards and reads again. Locked memory cannot be discarded.
func useMemory(locked bool) error {
	data := pattern(1<<20 + 77)
	for _, shared := range []bool{false, true} {
		m, err := lazymem.New(counted(data), &lazymem.Config{Shared: shared})
		if err != nil {
			return err
		}
		err = m.Do(func(mem []byte) error {
			if !bytes.Equal(mem, data) {
				return errors.New("wrong contents")
			}
			return nil
		})
		got := make([]byte, len(data))
		if err == nil {
			err = m.Discard(0, m.Size())
		}
		if locked && errors.Is(err, unix.EINVAL) && strings.Contains(err.Error(), "locked") {
			err = nil
		} else if locked && err == nil {
			err = errors.New("locked memory was discarded")
		}
		if err == nil {
			_, err = m.ReadAt(got, 0)
		}
		if err != nil || !bytes.Equal(got, data) {
			return fmt.Errorf("shared=%t: wrong contents, or %w", shared, err)
		}
		if err := m.Close(); err != nil {
			return err
		}
	}
	return nil
}
