//go:build linux

// Command firecracker serves the memory of Firecracker microVMs that are restored
// from one snapshot.
//
//	firecracker -socket PATH -mem FILE [-diff FILE]... [-record FILE] [-replay FILE] [-metrics ADDRESS]
//
// Start it, then restore as many microVMs as you like:
//
//	PUT /snapshot/load
//	{"snapshot_path": "...", "mem_backend": {"backend_type": "Uffd", "backend_path": "PATH"}}
//
// A page of a guest is read from the memory file when the guest touches it. Each
// -diff is the memory file of a diff snapshot, which holds what has changed since
// the files before it. What a guest's balloon gives back reads zeros. The files
// must not change while they are served, and whoever may connect to PATH can read
// them.
//
// -record writes which pages the first microVM touched, and in which order, when
// it exits or the handler ends. With -replay, those come in ahead of each microVM
// that starts; a record that is damaged or of another snapshot is reported and
// left alone.
//
// With -metrics, http://ADDRESS/ has the numbers of all microVMs as JSON.
//
// On SIGINT or SIGTERM it installs what the guests lack, and exits when they need
// it no more. On the second signal it exits at once: guests that touch a missing
// page then stand still.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-uffd/uffd/handoff"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

func main() {
	err := run(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "firecracker:", err)
		os.Exit(1)
	}
}

func run(args []string, output io.Writer) error {
	flags := flag.NewFlagSet("firecracker", flag.ContinueOnError)
	flags.SetOutput(output)
	socket := flags.String("socket", "", "listen on the unix socket `PATH`")
	mem := flags.String("mem", "", "serve the snapshot's memory `FILE`")
	var diffs []string
	flags.Func("diff", "lay the memory `FILE` of a diff snapshot on top (repeatable)", func(name string) error {
		diffs = append(diffs, name)
		return nil
	})
	record := flags.String("record", "", "write what the first microVM touches to `FILE`")
	replay := flags.String("replay", "", "bring in ahead what `FILE` has of -record")
	metrics := flags.String("metrics", "", "serve numbers over HTTP on `ADDRESS`")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *socket == "" || *mem == "" || flags.NArg() > 0 {
		flags.Usage()
		return errors.New("-socket and -mem are needed, and no arguments")
	}

	image, err := openImage(*mem, diffs)
	if err != nil {
		return err
	}
	identity, err := identityOf(append([]string{*mem}, diffs...)...)
	if err != nil {
		return err
	}
	l, err := listen(*socket)
	if err != nil {
		return err
	}
	defer l.Close()
	h := newHandler(image, log.New(output, "firecracker: ", 0))
	h.identity, h.record = identity, *record
	if *replay != "" {
		if h.replay, err = readRecord(*replay); err != nil {
			h.log.Printf("replay: %v", err)
		}
	}
	if *metrics != "" {
		m, err := net.Listen("tcp", *metrics)
		if err != nil {
			return err
		}
		defer m.Close()
		go http.Serve(m, http.HandlerFunc(h.metrics))
		h.log.Printf("metrics on http://%v/", m.Addr())
	}
	h.log.Printf("serving %s on %s", *mem, *socket)

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills
	return h.serve(ctx, l)
}

// openImage opens a memory file with those of diff snapshots on top of it.
func openImage(mem string, diffs []string) (source.Source, error) {
	base, err := source.OpenFile(mem)
	if err != nil {
		return nil, err
	}
	var layers []source.Source
	for _, name := range diffs {
		diff, err := source.OpenFile(name)
		if err != nil {
			return nil, err
		}
		layers = append(layers, diff)
	}
	if len(layers) == 0 {
		return base, nil
	}
	return source.Layer(base, layers...), nil
}

// listen listens on a socket, also if a handler that was killed has left it behind.
func listen(path string) (*net.UnixListener, error) {
	addr := &net.UnixAddr{Name: path, Net: "unix"}
	l, err := net.ListenUnix("unix", addr)
	if !errors.Is(err, syscall.EADDRINUSE) {
		return l, err
	}
	if info, statErr := os.Lstat(path); statErr != nil || info.Mode().Type() != os.ModeSocket {
		return nil, err
	}
	if conn, dialErr := net.DialUnix("unix", nil, addr); !errors.Is(dialErr, syscall.ECONNREFUSED) {
		if dialErr == nil {
			conn.Close()
		}
		return nil, err
	}
	if err := os.Remove(path); err != nil {
		return nil, err
	}
	return net.ListenUnix("unix", addr)
}

// A handler serves the microVMs of one snapshot.
type handler struct {
	image source.Source
	pager pager.Pager
	log   *log.Logger

	identity  string
	record    string // the file to write; "" for none
	recording atomic.Bool
	replay    *pager.Record // or nil

	vms                      sync.WaitGroup
	running, exited, refused atomic.Int64
}

const (
	helloTimeout = 10 * time.Second // for a message that Firecracker sends at once
	acceptPause  = 100 * time.Millisecond
)

func newHandler(image source.Source, log *log.Logger) *handler {
	h := &handler{image: image, log: log}
	h.pager.ErrorHook = func(_ *pager.Client, err error) { h.log.Print(err) }
	return h
}

// serve serves whoever connects, until ctx ends and no microVM needs it any more.
func (h *handler) serve(ctx context.Context, l *net.UnixListener) error {
	defer h.vms.Wait()
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		conn, err := l.AcceptUnix()
		switch {
		case err == nil:
			h.vms.Go(func() { h.serveConn(ctx, conn) })
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ECONNABORTED):
			h.log.Print(err)
			time.Sleep(acceptPause)
		default:
			return err
		}
	}
}

// serveConn serves a microVM until it exits.
func (h *handler) serveConn(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close() // Firecracker 1.12 and later keep their end, too
	vm, err := h.attach(conn)
	if err != nil {
		h.refused.Add(1)
		h.log.Printf("refused: %v", err)
		return
	}
	defer vm.close()
	h.running.Add(1)
	defer h.exited.Add(1)
	defer h.running.Add(-1)
	h.log.Printf("%v: serving %d regions", vm, vm.regions)

	record := h.record != "" && h.recording.CompareAndSwap(false, true)
	if record {
		vm.client.StartRecording(h.identity)
	}
	over := make(chan error, 1)
	go func() { over <- vm.client.Serve(context.Background()) }()
	if h.replay != nil {
		var replaying sync.WaitGroup
		replaying.Go(func() { h.replayTo(vm) })
		defer replaying.Wait()
	}
	exited := false
	select {
	case err = <-over:
		exited = true
	case <-ctx.Done():
	}
	if record {
		h.saveRecord(vm)
	}
	if !exited {
		err = h.finish(vm, over)
	}
	s := vm.client.Stats()
	h.log.Printf("%v: served for %v: %d faults, %d pages copied, %d zero, %d discards; a fault took %v (median), %v (99 %%)",
		vm, time.Since(vm.since).Round(time.Millisecond), s.Missing, s.Copied, s.Zeroed, s.Removes,
		s.Total.Quantile(0.5), s.Total.Quantile(0.99))
	if err != nil {
		h.log.Printf("%v: %v", vm, err)
	}
}

// finish makes a microVM independent of its handler, or else goes on until it
// exits.
func (h *handler) finish(vm *vm, over <-chan error) error {
	if err := vm.client.Graduate(context.Background(), nil); err != nil {
		h.log.Printf("%v: still needs its handler: %v", vm, err)
		return <-over
	}
	// A thread that was about to report a discard when the memory was
	// unregistered waits until that is read.
	select {
	case err := <-over:
		return err
	case <-time.After(time.Second):
		return nil
	}
}

// A vm is a microVM that is served.
type vm struct {
	pid     int
	client  *pager.Client
	regions int
	since   time.Time
	close   func()
}

func (v *vm) String() string { return fmt.Sprintf("microVM %d", v.pid) }

// attach makes a client of who has connected.
func (h *handler) attach(conn *net.UnixConn) (*vm, error) {
	// It goes on when the handler is to end: nobody else would serve that microVM.
	ctx, cancel := context.WithTimeoutCause(context.Background(), helloTimeout, errors.New("no message came in time"))
	defer cancel()
	file, received, err := handoff.ReceiveFirecracker(ctx, conn, h.image.Size())
	if err != nil {
		return nil, err
	}
	var regions []pager.Region
	for _, r := range received {
		regions = append(regions, pager.Region{Range: r.Range, Source: h.image, Offset: r.Offset, PageSize: r.PageSize})
	}
	client, err := h.pager.Attach(file, regions...)
	if err != nil {
		file.Close()
		return nil, err
	}
	v := &vm{client: client, regions: len(regions), since: time.Now()}
	v.pid, _ = handoff.PeerPid(conn) // for the log
	peer, err := handoff.OpenPeer(conn)
	if err == nil {
		client.Watch(peer)
	} else { // the pager finds out by itself, a little later
		h.log.Printf("%v: %v", v, err)
	}
	v.close = func() {
		client.Close()
		if peer != nil {
			peer.Close()
		}
		file.Close() // Firecracker has another one: nothing becomes zero
	}
	return v, nil
}

// metrics answers with the numbers of all microVMs.
func (h *handler) metrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	s := h.pager.Stats()
	json.NewEncoder(w).Encode(struct {
		Running, Exited, Refused int64
		MedianMicros, P99Micros  int64
		Pager                    pager.Stats
	}{
		h.running.Load(), h.exited.Load(), h.refused.Load(),
		s.Total.Quantile(0.5).Microseconds(), s.Total.Quantile(0.99).Microseconds(),
		s,
	})
}
