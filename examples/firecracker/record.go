//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/go-uffd/uffd/pager"
)

// identityOf says whose memory a record is: that of files of these names and
// sizes. A record of other files costs time, and never changes what a guest sees.
func identityOf(names ...string) (string, error) {
	var id strings.Builder
	for _, name := range names {
		info, err := os.Stat(name)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&id, "%s %d\n", filepath.Base(name), info.Size())
	}
	return id.String(), nil
}

// readRecord reads a record that saveRecord wrote.
func readRecord(name string) (*pager.Record, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	r := new(pager.Record)
	if err := r.UnmarshalBinary(data); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return r, nil
}

// saveRecord writes what a microVM has touched, whole or not at all.
func (h *handler) saveRecord(v *vm) {
	r := v.client.StopRecording()
	data, err := r.MarshalBinary()
	if err == nil {
		err = os.WriteFile(h.record+".new", data, 0o666)
	}
	if err == nil {
		err = os.Rename(h.record+".new", h.record)
	}
	if err != nil {
		h.log.Printf("%v: recording: %v", v, err)
		return
	}
	h.log.Printf("%v: recorded %d pages in %s", v, r.Pages(), h.record)
}

// replayTo brings in what the recorded microVM touched, ahead of this one.
func (h *handler) replayTo(v *vm) {
	if err := v.client.Replay(context.Background(), h.replay, h.identity, nil); err != nil {
		h.log.Printf("%v: replay: %v", v, err)
	}
}
