package uffd_test

import (
	"errors"
	"fmt"
	"io/fs"
	"log"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

// serve fills the memory from base on with image, page by page, as another
// process touches it.
func serve(f *uffd.File, base uffd.Addr, image []byte) error {
	size := uint64(os.Getpagesize())
	for {
		m, err := f.ReadMsg()
		if err != nil {
			return err
		}
		fault, ok := m.Pagefault()
		if !ok {
			continue
		}
		page := uffd.Range{Start: fault.Addr, Len: size}
		_, err = f.Copy(page.Start, image[page.Start-base:][:size], 0)
		if errors.Is(err, fs.ErrExist) || errors.Is(err, uffd.ErrRetry) { // let the thread look again
			err = f.Wake(page)
		}
		if err != nil {
			return err
		}
	}
}

// Open with one feature that is needed and one that is welcome.
func ExampleNew() {
	f, err := uffd.New(&uffd.Config{
		Require: uffd.FeatureEventRemove,
		Prefer:  uffd.FeatureThreadID,
	})
	var missing *uffd.FeatureError
	if errors.As(err, &missing) {
		log.Fatalf("this kernel is too old: %v", missing)
	}
	if err != nil {
		log.Fatal(err) // says which ways were tried, and what would help
	}
	defer f.Close()

	if only, _ := f.UserModeOnly(); only {
		fmt.Println("system calls on missing memory will fail")
	}
	fmt.Println("thread ids:", f.Features().Has(uffd.FeatureThreadID))
}

// Ask what the kernel offers.
func ExampleProbe() {
	offered, err := uffd.Probe()
	if err != nil {
		log.Fatal(err)
	}
	if !offered.Has(uffd.FeatureWPAsync) {
		fmt.Println("WP_ASYNC needs Linux", uffd.FeatureWPAsync.Since())
	}
}

// Receive a userfaultfd from another process, over a unix socket.
func ExampleFromFD() {
	var conn *net.UnixConn // connected to the process that owns the memory
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		log.Fatal(err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		log.Fatal("no descriptor came: ", err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		log.Fatal(err)
	}
	f, err := uffd.FromFD(fds[0])
	if err != nil {
		unix.Close(fds[0])
		log.Fatal(err)
	}
	defer f.Close()
	fmt.Println("enabled:", f.Features())
}

// Copy all of src, going on after partial results.
func ExampleFile_Copy() {
	install := func(f *uffd.File, dst uffd.Addr, src []byte) error {
		for len(src) > 0 {
			n, err := f.Copy(dst, src, 0)
			dst, src = dst+uffd.Addr(n), src[n:]
			switch {
			case errors.Is(err, uffd.ErrRetry) && n == 0:
				return err // an event waits: read it, then try again
			case errors.Is(err, uffd.ErrRetry), err == nil:
				// go on with the rest
			case errors.Is(err, unix.EEXIST):
				// This page came by another way. Wake who waits for it, and skip it.
				page := uffd.Range{Start: dst, Len: uint64(os.Getpagesize())}
				if err := f.Wake(page); err != nil {
					return err
				}
				dst, src = page.End(), src[page.Len:]
			default:
				return err
			}
		}
		return nil
	}
	_ = install
}

func serveChild(f *uffd.File) { defer f.Close() }

// Handle the events of a batch before its faults: the kernel delivers faults
// first, whatever happened first.
func ExampleFile_ReadMsgs() {
	var f *uffd.File // with FeatureEventFork and FeatureEventRemove
	msgs := make([]uffd.Msg, 32)
	for {
		n, err := f.ReadMsgs(msgs)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			log.Fatal(err)
		}
		for i := range msgs[:n] {
			m := &msgs[i]
			switch m.Event() {
			case uffd.EventFork:
				child, err := f.Child(m) // or close the descriptor
				if err != nil {
					log.Fatal(err)
				}
				go serveChild(child)
			case uffd.EventRemove:
				r, _ := m.Remove()
				fmt.Println("reads zeros from now on:", r)
			}
		}
		for i := range msgs[:n] {
			if fault, ok := msgs[i].Pagefault(); ok {
				fmt.Println("wants a page:", fault.Addr)
			}
		}
	}
}

// Fault memory in before code touches it that cannot be stopped in a fault.
func ExamplePopulate() {
	var mem []byte // registered, and served by a goroutine of this process
	buf := make([]byte, 8192)
	if err := uffd.Populate(mem[:len(buf)], false); err != nil {
		log.Fatal(err)
	}
	copy(buf, mem) // would hang the process if a page were missing
}
