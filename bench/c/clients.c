/* The clients: requests one after the other on kept connections, or streams that run at the same time.

   usage: clients requests PORT CLIENTS APART WARM SECONDS COUNT FILE...
          clients streams PORT STREAMS OPEN STEADY PROBING PROBES STREAM-FILE... PROBE-FILE

   Each FILE is a request as it goes over the wire; client k sends the k-th of them, again and again.
   `requests` sends one every APART seconds from each client, or at once if its last answer took longer. It
   warms up, then counts for so many seconds or requests, whichever is first (COUNT 0: no bound);
   where fewer requests than clients are done by then it goes on, for five times as long at most.
   `streams` opens STREAMS in OPEN seconds, watches them for STEADY, then begins PROBES new ones a second
   for PROBING seconds. Prints "begin" and "end" at each part's bounds, where the CPU clocks are to be
   read, and at its end one line of JSON, times in milliseconds. */

#include "wire.h"

typedef struct {
    char *data;
    size_t length;
    int stamps; /* that a whole answer to it has */
} Request;

typedef struct {
    int32_t *us;
    size_t count, room;
} Times;

typedef struct {
    int fd;
    enum { LOOP, STREAM, PROBE } kind;
    const Request *request;
    size_t sent;
    int64_t begun, due;
    bool is_waiting; /* until its next request is due */
    bool is_answered; /* the first byte of its body is here */
    Message message;
    int stamps; /* of the answer in hand */
    char carried[STAMP_LENGTH];
    size_t carried_length;
} Link;

static int epoll, timer, port;
static Link **loopers; /* the clients of `requests` */
static int looper_count;
static int64_t apart;
static bool is_measuring, is_ending;
static int measured_from; /* requests that were done when measuring began */
static int done, failed, reconnected, ended;
static int64_t deltas; /* that came while measuring */
static Times delays, lateness, firsts, durations;

static void add(Times *times, int64_t ns) {
    if (times->count == times->room) {
        times->room = times->room * 2 + 1024;
        times->us = realloc(times->us, times->room * sizeof *times->us);
    }
    times->us[times->count++] = (int32_t)(ns / 1000);
}

static int ascending(const void *one, const void *other) {
    int32_t a = *(const int32_t *)one, b = *(const int32_t *)other;
    return (a > b) - (a < b);
}

/* Nearest rank. */
static double at_rank(const Times *times, double part) {
    if (times->count == 0) return -1;
    size_t rank = (size_t)(part * (double)times->count + 0.999999);
    return times->us[rank > 0 ? rank - 1 : 0] / 1000.0;
}

static void print_times(const char *name, Times *times) {
    qsort(times->us, times->count, sizeof *times->us, ascending);
    printf("\"%s\": {\"count\": %zu, \"p50\": %.3f, \"p99\": %.3f, \"worst\": %.3f}, ", name, times->count,
           at_rank(times, 0.5), at_rank(times, 0.99), at_rank(times, 1));
}

static void mark(const char *what) {
    puts(what);
    fflush(stdout);
}

static bool is_stream(const Request *request) {
    const char *key = "\"stream\":true";
    return memmem(request->data, request->length, key, strlen(key)) != NULL;
}

static int max_tokens(const Request *request) {
    const char *key = "\"max_tokens\":", *at = memmem(request->data, request->length, key, strlen(key));
    return at == NULL ? 0 : atoi(at + strlen(key));
}

static Request load(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) fail(path);
    fseek(file, 0, SEEK_END);
    Request request = {.length = (size_t)ftell(file)};
    rewind(file);
    request.data = malloc(request.length);
    if (fread(request.data, 1, request.length, file) != request.length) fail(path);
    fclose(file);
    request.stamps = is_stream(&request) ? max_tokens(&request) : 1;
    return request;
}

static void stamp(Link *link, const char *text) {
    if (text[1] != 't') return;
    link->stamps++;
    if (!is_measuring || link->kind != STREAM) return;
    deltas++;
    add(&delays, now_ns() - digits(text + 2, 19));
    add(&lateness, digits(text + 22, 8) * 1000);
}

/* Find the stamps of a body that comes in pieces. */
static void look_through(void *whose, const char *data, size_t length) {
    Link *link = whose;
    if (!link->is_answered && link->kind == PROBE) add(&firsts, now_ns() - link->begun);
    link->is_answered = true;
    while (length > 0) {
        if (link->carried_length == 0) {
            const char *at = memchr(data, '@', length);
            if (at == NULL) return;
            length -= (size_t)(at - data);
            data = at;
        }
        size_t piece = STAMP_LENGTH - link->carried_length;
        if (piece > length) piece = length;
        memcpy(link->carried + link->carried_length, data, piece);
        link->carried_length += piece;
        data += piece;
        length -= piece;
        if (link->carried_length < STAMP_LENGTH) return;
        stamp(link, link->carried);
        link->carried_length = 0;
    }
}

static void push(Link *link) {
    while (link->sent < link->request->length) {
        const char *data = link->request->data + link->sent;
        ssize_t sent = send(link->fd, data, link->request->length - link->sent, MSG_NOSIGNAL);
        if (sent < 0) {
            /* Reading will tell of a connection that broke. */
            watch(epoll, EPOLL_CTL_MOD, link->fd, EPOLLIN | (errno == EAGAIN ? EPOLLOUT : 0), link);
            return;
        }
        link->sent += (size_t)sent;
    }
    watch(epoll, EPOLL_CTL_MOD, link->fd, EPOLLIN, link);
}

static void ask(Link *link) {
    begin_message(&link->message, true);
    link->sent = 0;
    link->stamps = 0;
    link->carried_length = 0;
    link->is_answered = false;
    push(link);
}

static void open_link(Link *link) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    address.sin_port = htons((uint16_t)port);
    link->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    link->begun = now_ns();
    /* On loopback connect waits for nothing but room in the listener's queue. */
    if (connect(link->fd, (void *)&address, sizeof address) < 0) fail("connect");
    no_delay(link->fd);
    int flags = SOCK_NONBLOCK;
    if (ioctl(link->fd, FIONBIO, &flags) < 0) fail("ioctl");
    watch(epoll, EPOLL_CTL_ADD, link->fd, EPOLLIN, link);
    ask(link);
}

static Link *new_link(int kind, const Request *request) {
    Link *link = calloc(1, sizeof *link);
    link->kind = kind;
    link->request = request;
    open_link(link);
    return link;
}

static void ask_again(Link *link) {
    link->is_waiting = false;
    link->begun = now_ns();
    link->due += apart;
    if (link->due < link->begun) link->due = link->begun;
    if (link->fd < 0) open_link(link);
    else ask(link);
}

/* An answer that is whole, or will not become so. */
static void finish(Link *link, bool is_whole) {
    int expected = link->request->stamps;
    bool is_well = is_whole && link->message.status == 200 && link->stamps == expected;
    if (!is_well && failed++ == 0)
        fprintf(stderr, "status %d, %d stamps of %d, whole: %d\n%.1000s\n", link->message.status, link->stamps,
                expected, is_whole, link->message.head);
    if (is_well && link->kind == LOOP && is_measuring) add(&durations, now_ns() - link->begun);
    done++;
    if (link->kind != LOOP || is_ending) {
        if (link->kind == LOOP) ended++;
        close(link->fd);
        free(link);
        return;
    }
    if (!is_whole || link->message.closes) {
        reconnected++;
        close(link->fd);
        link->fd = -1;
    }
    if (now_ns() < link->due) link->is_waiting = true;
    else ask_again(link);
}

static void receive(Link *link) {
    static char data[READ_AT_ONCE];
    ssize_t length = recv(link->fd, data, sizeof data, 0);
    if (length < 0 && errno == EAGAIN) return;
    if (length <= 0) {
        finish(link, link->message.part == UNTIL_CLOSE);
        return;
    }
    read_message(&link->message, data, (size_t)length, look_through, link);
    if (link->message.part == DONE) finish(link, true);
}

/* Wait until the time at most, once; true once it has come. */
static bool turn(int64_t until) {
    struct epoll_event events[64];
    int64_t next = until;
    for (int i = 0; i < looper_count; i++)
        if (loopers[i]->is_waiting && loopers[i]->due < next) next = loopers[i]->due;
    set_timer(timer, next);
    int ready = epoll_wait(epoll, events, 64, -1);
    for (int i = 0; i < ready; i++) {
        Link *link = events[i].data.ptr;
        if (link == NULL) continue;
        if (events[i].events & EPOLLOUT) push(link);
        if (events[i].events & ~(uint32_t)EPOLLOUT) receive(link);
    }
    int64_t now = looper_count > 0 ? now_ns() : 0;
    for (int i = 0; i < looper_count; i++)
        if (loopers[i]->is_waiting && loopers[i]->due <= now) ask_again(loopers[i]);
    return now_ns() >= until;
}

static void run_until(int64_t until) {
    while (!turn(until)) {}
}

static void begin_measuring(void) {
    mark("begin");
    is_measuring = true;
    measured_from = done;
}

static void end_measuring(void) {
    is_measuring = false;
    mark("end");
}

static int64_t in_seconds(const char *text) { return (int64_t)(atof(text) * (double)SECOND); }

static void print_end(void) {
    printf("\"failed\": %d, \"reconnected\": %d}\n", failed, reconnected);
}

static void begin_loops(int clients, const Request *kinds, int files) {
    int64_t begun = now_ns();
    loopers = calloc((size_t)clients, sizeof *loopers);
    for (int i = 0; i < clients; i++) {
        run_until(begun + apart * i / clients);
        Link *link = new_link(LOOP, &kinds[i % files]);
        link->due = link->begun + apart;
        loopers[i] = link;
        looper_count++;
    }
}

/* What is on its way comes to its end, so that nothing of it falls into what is measured next. */
static void end_loops(void) {
    is_ending = true;
    for (int i = 0; i < looper_count; i++) ended += loopers[i]->is_waiting;
    int clients = looper_count;
    looper_count = 0;
    int64_t patience = now_ns() + 20 * SECOND;
    while (ended < clients && !turn(patience)) {}
}

static int requests(int count, char **arguments) {
    int clients = atoi(arguments[1]), bound = atoi(arguments[5]), files = count - 6;
    Request *kinds = calloc((size_t)files, sizeof *kinds);
    for (int i = 0; i < files; i++) kinds[i] = load(arguments[6 + i]);
    apart = in_seconds(arguments[2]);
    begin_loops(clients, kinds, files);
    run_until(now_ns() + in_seconds(arguments[3]));
    begin_measuring();
    int64_t begun = now_ns(), until = begun + in_seconds(arguments[4]);
    while (!turn(until) && (bound == 0 || done - measured_from < bound)) {}
    /* Of a slow proxy so many that those begun before and those not yet done make no odds. */
    while (bound == 0 && done - measured_from < clients && !turn(begun + 5 * (until - begun))) {}
    int measured = done - measured_from;
    double seconds = (double)(now_ns() - begun) / SECOND;
    end_measuring();
    end_loops();
    printf("{\"requests\": %d, \"seconds\": %.3f, ", measured, seconds);
    print_times("durations", &durations);
    print_end();
    return 0;
}

static int streams(int count, char **arguments) {
    int number = atoi(arguments[1]), files = count - 6, probes = 0;
    int64_t opening = in_seconds(arguments[2]), steady = in_seconds(arguments[3]);
    int64_t probing = in_seconds(arguments[4]), interval = SECOND / atoi(arguments[5]);
    Request *kinds = calloc((size_t)files, sizeof *kinds);
    for (int i = 0; i < files; i++) kinds[i] = load(arguments[6 + i]);
    Request *probe = &kinds[--files];

    int64_t begun = now_ns();
    for (int i = 0; i < number; i++) {
        run_until(begun + opening * i / number);
        new_link(STREAM, &kinds[i % files]);
    }
    run_until(begun + opening + SECOND / 10);
    int64_t from = now_ns();
    begin_measuring();
    run_until(from + steady);
    double seconds = (double)(now_ns() - from) / SECOND;
    end_measuring();
    run_until(now_ns() + SECOND / 4); /* memory is read meanwhile */
    from = now_ns();
    mark("begin");
    for (; from + interval * probes < from + probing; probes++) {
        run_until(from + interval * probes);
        new_link(PROBE, probe);
    }
    run_until(from + probing);
    mark("end");
    /* Those that keep time are over soon; what is not by then is told as unfinished. */
    int64_t until = now_ns() + 3 * SECOND;
    while (done < number + probes && !turn(until)) {}
    printf("{\"deltas\": %lld, \"seconds\": %.3f, \"probes\": %d, \"unfinished\": %d, ", (long long)deltas, seconds,
           probes, number + probes - done);
    print_times("delays", &delays);
    print_times("lateness", &lateness);
    print_times("first_bytes", &firsts);
    print_end();
    return 0;
}

int main(int count, char **arguments) {
    if (count < 3) return 2;
    begin_program();
    epoll = epoll_create1(EPOLL_CLOEXEC);
    timer = new_timer(epoll);
    port = atoi(arguments[2]);
    if (strcmp(arguments[1], "requests") == 0 && count >= 9) return requests(count - 2, arguments + 2);
    if (strcmp(arguments[1], "streams") == 0 && count >= 10) return streams(count - 2, arguments + 2);
    return 2;
}
