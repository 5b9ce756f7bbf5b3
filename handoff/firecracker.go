package handoff

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"

	"github.com/go-uffd/uffd"
)

// firecrackerRegion is an element of Firecracker's message. Fields that are not
// listed are ignored: development versions have some.
type firecrackerRegion struct {
	Base        *uint64 `json:"base_host_virt_addr"`
	Size        *uint64 `json:"size"`
	Offset      *uint64 `json:"offset"`
	PageSize    *uint64 `json:"page_size,omitempty"`     // from 1.12 on
	PageSizeKiB *uint64 `json:"page_size_kib,omitempty"` // from 1.7 on: bytes, in spite of its name
}

// firecrackerPage is the size of pages of versions that do not tell.
const firecrackerPage = 4096

// ReceiveFirecracker receives the memory of a Firecracker (1.1 or newer) that has
// connected to restore a snapshot. memorySize is the size of the snapshot's memory
// file. Start serving at once: faults come before Firecracker answers the request
// to load the snapshot.
//
// From version 1.12 on Firecracker keeps the connection open until it exits;
// earlier ones close it at once, so watch the process: see [OpenPeer].
//
// Firecracker's userfaultfd reports what the balloon discards
// ([uffd.FeatureEventRemove]): such pages have to read zeros from then on.
//
// Errors: [*MessageError] if it is not Firecracker's message, longer than 1 MiB or
// with more than 4,096 regions; or if regions overlap, wrap around, are not
// aligned or reach out of the memory file. Others as with [Receive].
func ReceiveFirecracker(ctx context.Context, conn *net.UnixConn, memorySize int64) (*uffd.File, []Region, error) {
	var regions []Region
	f, err := receive(ctx, conn, true, func(r io.Reader) (err error) {
		regions, err = decodeFirecracker(r, memorySize)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return f, regions, nil
}

// decodeFirecracker reads an array without a length or an end: it is over when it
// is complete.
func decodeFirecracker(r io.Reader, memorySize int64) ([]Region, error) {
	d := json.NewDecoder(&limit{r, maxMessage})
	if token, err := d.Token(); err != nil {
		return nil, fmt.Errorf("not Firecracker's: %w", err)
	} else if token != json.Delim('[') {
		return nil, fmt.Errorf("not Firecracker's: it starts with %v instead of a list of regions", token)
	}
	var regions []Region
	for d.More() {
		var raw firecrackerRegion
		if err := d.Decode(&raw); err != nil {
			return nil, fmt.Errorf("region %d: %w", len(regions), err)
		}
		region, err := raw.region()
		if err != nil {
			return nil, fmt.Errorf("region %d: %w", len(regions), err)
		}
		regions = append(regions, region)
	}
	if _, err := d.Token(); err != nil { // More reports false on errors, too
		return nil, err
	}
	rest, err := io.ReadAll(d.Buffered())
	if err != nil {
		return nil, err
	}
	if rest = bytes.TrimSpace(rest); len(rest) > 0 {
		return nil, fmt.Errorf("%q follows the list of regions", rest[:min(len(rest), 32)])
	}
	return regions, checkRegions(regions, memorySize)
}

func (raw *firecrackerRegion) region() (Region, error) {
	if raw.Base == nil || raw.Size == nil || raw.Offset == nil {
		return Region{}, errors.New("base_host_virt_addr, size or offset is missing")
	}
	page := uint64(firecrackerPage)
	if raw.PageSize != nil {
		page = *raw.PageSize
	} else if raw.PageSizeKiB != nil {
		page = *raw.PageSizeKiB
	}
	if page == 0 || page > maxPage {
		return Region{}, fmt.Errorf("%d bytes is not the size of a page", page)
	}
	if *raw.Offset > math.MaxInt64 {
		return Region{}, fmt.Errorf("its offset is %d", *raw.Offset)
	}
	return Region{
		Range:    uffd.Range{Start: uffd.Addr(*raw.Base), Len: *raw.Size},
		Offset:   int64(*raw.Offset),
		PageSize: int(page),
	}, nil
}

// SendFirecracker sends what Firecracker sends: for a VMM that wants to be served
// by a handler that was made for it. It should have enabled
// [uffd.FeatureEventRemove] and registered the regions for missing pages.
func SendFirecracker(ctx context.Context, conn *net.UnixConn, f *uffd.File, regions []Region) error {
	if err := checkRegions(regions, math.MaxInt64); err != nil {
		return fmt.Errorf("handoff: sending: %w", err)
	}
	list := make([]firecrackerRegion, len(regions))
	for i, r := range regions {
		base, size, offset, page := uint64(r.Range.Start), r.Range.Len, uint64(r.Offset), uint64(r.PageSize)
		if page == 0 {
			page = uint64(os.Getpagesize())
		}
		list[i] = firecrackerRegion{Base: &base, Size: &size, Offset: &offset, PageSize: &page, PageSizeKiB: &page}
	}
	message, err := json.Marshal(list)
	if err != nil {
		return fmt.Errorf("handoff: sending: %w", err)
	}
	return Send(ctx, conn, f, message)
}
