package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/gateway"
	"github.com/sheaf-project/sheaf/registry"
)

// defaultGateway is where faas-cli looks, too.
func defaultGateway() string {
	if u := os.Getenv("OPENFAAS_URL"); u != "" {
		return u
	}
	return "http://127.0.0.1:8080"
}

// ps is the command that shows the record of replicas.
func ps(ctx context.Context, args []string, s std) error {
	f := flags(s, "ps", "ps [FLAGS]", "sheaf ps --watch")
	watch := f.Bool("watch", false, "show it again at each change, until ^C")
	url := f.String("gateway", defaultGateway(), "`URL` of the stack")
	output := f.String("output", "text", "`form`: text or json")
	rest, err := parse(f, args)
	if err == nil && len(rest) > 0 {
		err = usagef("ps takes no argument, and got %q", rest[0])
	}
	if err == nil {
		err = oneOf("output", *output, "text", "json")
	}
	if err != nil {
		return err
	}
	client, err := newClient(*url)
	if err != nil {
		return err
	}
	defer client.Close()
	body, err := client.Views(ctx, *watch)
	if errors.Is(err, gateway.ErrUnauthorized) {
		return fmt.Errorf("%w; log in with faas-cli login --gateway %s", err, *url)
	}
	if err != nil {
		return fmt.Errorf("%w; is a stack running there? sheaf up starts one", err)
	}
	defer body.Close()
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		if len(lines.Bytes()) == 0 { // a heartbeat
			continue
		}
		if *output == "json" {
			if _, err := fmt.Fprintf(s.out, "%s\n", lines.Bytes()); err != nil {
				return err
			}
			continue
		}
		var records []registry.Record
		if err := json.Unmarshal(lines.Bytes(), &records); err != nil {
			return fmt.Errorf("record of replicas: %w", err)
		}
		if err := table(s.out, records); err != nil {
			return err
		}
		if *watch {
			fmt.Fprintln(s.out)
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	return lines.Err()
}

// table writes a line for each replica.
func table(out io.Writer, records []registry.Record) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "FUNCTION\tRANK\tREPLICA\tADDRESS\tSTATE\tSINCE\tEPOCH")
	for _, r := range records {
		if len(r.Replicas) == 0 {
			fmt.Fprintf(w, "%s\t-\t-\t-\t0 of %d\t-\t%d\n", r.Function, r.Desired, r.Epoch)
		}
		rank := 0
		for _, rep := range r.Replicas {
			place := "-"
			if rep.State == sheaf.Ready {
				place = strconv.Itoa(rank)
				rank++
			}
			address := rep.URL
			if address == "" {
				address = "-"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%d\n", r.Function, place, rep.ID, address, rep.State,
				rep.Since.Local().Format(time.TimeOnly), r.Epoch)
		}
	}
	return w.Flush()
}
