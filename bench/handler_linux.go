package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/handoff"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// Ways to resolve a fault, as in c/common.h.
const (
	opCopy = iota + 1
	opZeroPage
	opContinue
	opWriteProtect
)

// A handler is the Go counterpart of c/handler.c.
type handler struct {
	conn *net.UnixConn
	file *uffd.File

	memory uffd.Range
	page   uint64
	op     uint64
	pid    int // of the client

	loop   string // "root", "pager", "workers" or "process"
	image  string // file name
	around int    // pages
	bulk   int    // bytes
	rounds int
	burn   int // goroutines that compute
	nice   int
	record string // file name, to write
	replay string // file name
}

// handlerMain is the process of a handler.
func handlerMain(args []string) error {
	h := &handler{loop: "root", around: 1, rounds: 1}
	for _, arg := range args {
		name, value, _ := strings.Cut(arg, "=")
		number, err := strconv.Atoi(value)
		switch name {
		case "loop":
			h.loop, err = value, nil
		case "image":
			h.image, err = value, nil
		case "record":
			h.record, err = value, nil
		case "replay":
			h.replay, err = value, nil
		case "around":
			h.around = number
		case "bulk":
			h.bulk = number
		case "rounds":
			h.rounds = number
		case "burn":
			h.burn = number
		case "nice":
			h.nice = number
		default:
			err = errors.New("unknown argument")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", arg, err)
		}
	}
	if err := h.receive(); err != nil {
		return err
	}
	for range h.burn {
		go func() {
			var n atomic.Int64
			for {
				n.Add(1)
			}
		}()
	}
	if h.bulk > 0 {
		return h.fillAll()
	}
	return h.serve()
}

// receive takes what the client sends.
func (h *handler) receive() error {
	socket := os.NewFile(3, "client")
	conn, err := net.FileConn(socket)
	if err != nil {
		return err
	}
	socket.Close()
	h.conn = conn.(*net.UnixConn)
	var hello [40]byte
	if h.file, err = handoff.Receive(context.Background(), h.conn, hello[:]); err != nil {
		return err
	}
	word := func(i int) uint64 { return binary.NativeEndian.Uint64(hello[8*i:]) }
	h.memory = uffd.Range{Start: uffd.Addr(word(0)), Len: word(1)}
	h.page, h.op, h.pid = word(2), word(3), int(word(4))
	return nil
}

// ready lets the client begin.
func (h *handler) ready() error {
	_, err := h.conn.Write([]byte("r"))
	return err
}

func (h *handler) serve() error {
	switch h.loop {
	case "root":
		image, err := mapImage(h.image, h.memory.Len)
		if err != nil {
			return err
		}
		if err := h.ready(); err != nil {
			return err
		}
		return h.serveRoot(image)
	case "process":
		if err := h.ready(); err != nil {
			return err
		}
		p := new(pager.Pager)
		p.FaultAround = h.around * int(h.page)
		return p.ServeProcess(context.Background(), h.file, h.nice, pager.ProcessRegion{
			Range: h.memory, Source: h.image, PageSize: int(h.page),
		})
	}
	src, err := h.source()
	if err != nil {
		return err
	}
	c, err := h.attach(src)
	if err != nil {
		return err
	}
	if h.record != "" {
		c.StartRecording(h.image)
	}
	if h.replay != "" {
		if err := h.startReplay(c); err != nil {
			return err
		}
	}
	if err := h.ready(); err != nil {
		return err
	}
	if err := c.Serve(context.Background()); err != nil || h.record == "" {
		return err
	}
	data, err := c.StopRecording().MarshalBinary()
	if err != nil {
		return err
	}
	return os.WriteFile(h.record, data, 0o600)
}

// startReplay has pages installed that were recorded.
func (h *handler) startReplay(c *pager.Client) error {
	data, err := os.ReadFile(h.replay)
	if err != nil {
		return err
	}
	r := new(pager.Record)
	if err := r.UnmarshalBinary(data); err != nil {
		return err
	}
	go func() {
		if err := c.Replay(context.Background(), r, h.image, nil); err != nil && !errors.Is(err, uffd.ErrGone) {
			fmt.Fprintln(os.Stderr, "replay:", err)
		}
	}()
	return nil
}

// serveRoot is the loop that package uffd shows, on as many messages as there are.
func (h *handler) serveRoot(image []byte) error {
	window := h.page * uint64(h.around)
	msgs := make([]uffd.Msg, 16)
	for {
		n, err := h.file.ReadMsgs(msgs)
		if err != nil {
			return err
		}
		for i := range msgs[:n] {
			fault, ok := msgs[i].Pagefault()
			if !ok {
				continue
			}
			off := uint64(fault.Addr-h.memory.Start) / window * window
			r := uffd.Range{Start: h.memory.Start + uffd.Addr(off), Len: min(window, h.memory.Len-off)}
			switch h.op {
			case opCopy:
				_, err = h.file.Copy(r.Start, image[off:][:r.Len], 0)
			case opZeroPage:
				_, err = h.file.ZeroPage(r, 0)
			case opContinue:
				_, err = h.file.Continue(r, 0)
			case opWriteProtect:
				err = h.file.WriteProtect(r, 0)
			}
			if err != nil {
				err = h.file.Wake(r)
			}
			if err != nil {
				return err
			}
		}
	}
}

// mapImage maps the image, with all its pages, as the C handler does.
func mapImage(name string, size uint64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
}

// source is what a pager reads.
func (h *handler) source() (source.Source, error) {
	if h.op != opCopy {
		return source.Zero(int64(h.memory.Len)), nil
	}
	if h.loop == "workers" { // a source that may wait
		f, err := os.Open(h.image)
		if err != nil {
			return nil, err
		}
		return source.FromReaderAt(f, int64(h.memory.Len)), nil
	}
	return openImage(h.image)
}

// openImage opens a file and maps all of it.
func openImage(name string) (source.Source, error) {
	f, err := source.OpenFile(name)
	if err != nil {
		return nil, err
	}
	err = f.Borrow(0, int(f.Size()), func(p []byte) error { return unix.Madvise(p, unix.MADV_POPULATE_READ) })
	return f, err
}

// attach makes a new client, to which all pages are missing.
func (h *handler) attach(src source.Source) (*pager.Client, error) {
	p := &pager.Pager{
		FaultAround: h.around * int(h.page),
		ErrorHook:   func(_ *pager.Client, err error) { fmt.Fprintln(os.Stderr, "pager:", err) },
	}
	return p.Attach(h.file, pager.Region{Range: h.memory, Source: src, PageSize: int(h.page)})
}

// fillAll fills the memory over and over, and prints the bytes and the
// nanoseconds.
func (h *handler) fillAll() error {
	fill, err := h.filler()
	if err != nil {
		return err
	}
	if err := h.ready(); err != nil {
		return err
	}
	var total time.Duration
	for round := 1; round <= h.rounds; round++ {
		command := []byte("d") // discard
		if round == h.rounds {
			command = []byte("e") // and end
		}
		if _, err := h.conn.Write(command); err != nil {
			return err
		}
		if _, err := h.conn.Read(command); err != nil {
			return err
		}
		took, err := fill()
		if err != nil {
			return err
		}
		total += took
	}
	fmt.Println(h.memory.Len*uint64(h.rounds), total.Nanoseconds())
	_, err = h.conn.Write([]byte("e"))
	return err
}

// filler returns what fills the memory once.
func (h *handler) filler() (func() (time.Duration, error), error) {
	if h.loop == "root" {
		image, err := mapImage(h.image, h.memory.Len)
		return func() (time.Duration, error) {
			begin := time.Now()
			for off := 0; off < len(image); off += h.bulk {
				if _, err := h.file.Copy(h.memory.Start+uffd.Addr(off), image[off:][:h.bulk], 0); err != nil {
					return 0, err
				}
			}
			return time.Since(begin), nil
		}, err
	}
	src, err := h.source()
	return func() (time.Duration, error) {
		c, err := h.attach(src)
		if err != nil {
			return 0, err
		}
		defer c.Close()
		go c.Serve(context.Background())
		begin := time.Now()
		err = c.Populate(context.Background(), nil)
		return time.Since(begin), err
	}, err
}
