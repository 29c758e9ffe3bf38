/* A stand-in for the Messages API: answers every POST at once, or in a stream that keeps time.

   usage: upstream DELTAS_PER_SECOND. Prints its port. A request's max_tokens says how many deltas its stream
   has. Streams beat on one grid, each at a place of its own, so that deltas do not come in bursts. Each delta
   tells when it was sent and how late that was. A delta that a full socket has no room for is sent later. */

#include "wire.h"

#define STREAM_HEAD                                                               \
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"       \
    "cache-control: no-cache\r\nrequest-id: req_bench\r\ntransfer-encoding: chunked\r\n\r\n"
#define STREAM_BEGIN                                                                                      \
    "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_bench\","          \
    "\"type\":\"message\",\"role\":\"assistant\",\"model\":\"claude-opus-4-8\",\"content\":[],"           \
    "\"stop_reason\":null,\"stop_sequence\":null,\"usage\":{\"input_tokens\":250,"                        \
    "\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":75000,\"output_tokens\":1}}}\n\n"      \
    "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,"                    \
    "\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n"
#define DELTA_BEGIN                                                               \
    "event: content_block_delta\ndata: {\"type\":\"content_block_delta\","        \
    "\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\""
#define DELTA_END "\"}}\n\n"
#define STREAM_END                                                                                  \
    "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n"            \
    "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":"           \
    "\"end_turn\",\"stop_sequence\":null},\"usage\":{\"output_tokens\":400}}\n\n"                   \
    "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"
#define ANSWER_BEGIN                                                                                   \
    "{\"id\":\"msg_bench\",\"type\":\"message\",\"role\":\"assistant\",\"model\":\"claude-opus-4-8\"," \
    "\"content\":[{\"type\":\"text\",\"text\":\""
#define ANSWER_END                                                                                      \
    "\"}],\"stop_reason\":\"end_turn\",\"stop_sequence\":null,\"usage\":{\"input_tokens\":250,"         \
    "\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":75000,\"output_tokens\":180}}"
#define ANSWER_TEXT 700

typedef struct Link {
    int fd;
    Message message;
    char *body;
    size_t length, room;
    int deltas; /* left to send; -1: no stream runs */
    int64_t due;
    struct Link *before, *after; /* streams, the next one due first */
    char waiting[1024];          /* what the socket had no room for */
    size_t waiting_length;
} Link;

static char answer[4096], opening[4096], delta[512], ending[1024];
static size_t answer_length, answer_stamp, opening_length, delta_length, delta_stamp, ending_length;
static Link *first, *last;
static int64_t period;

static size_t chunk(char *to, size_t room, const char *content) {
    return (size_t)snprintf(to, room, "%zx\r\n%s\r\n", strlen(content), content);
}

static void make_answers(void) {
    char stamp[STAMP_LENGTH + 1], body[3072], text[ANSWER_TEXT + 1];
    snprintf(stamp, sizeof stamp, STAMP_FORMAT, 0LL, 0LL);
    for (int i = 0; i < ANSWER_TEXT; i++) text[i] = "plain words of an answer "[i % 25];
    text[ANSWER_TEXT] = 0;
    snprintf(body, sizeof body, ANSWER_BEGIN "%s%s" ANSWER_END, stamp, text);
    answer_length = (size_t)snprintf(answer, sizeof answer,
                                     "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                                     "request-id: req_bench\r\ncontent-length: %zu\r\n\r\n%s",
                                     strlen(body), body);
    answer_stamp = (size_t)(strstr(answer, "@t") - answer);
    strcpy(opening, STREAM_HEAD);
    opening_length = strlen(STREAM_HEAD);
    opening_length += chunk(opening + opening_length, sizeof opening - opening_length, STREAM_BEGIN);
    snprintf(body, sizeof body, DELTA_BEGIN "%s" DELTA_END, stamp);
    delta_length = chunk(delta, sizeof delta, body);
    delta_stamp = (size_t)(strstr(delta, "@t") - delta);
    ending_length = chunk(ending, sizeof ending, STREAM_END);
    strcpy(ending + ending_length, "0\r\n\r\n");
    ending_length += 5;
}

/* Answers are small: what a socket has no room for waits in the link, and nothing is sent before it. */
static bool send_all(Link *link, const char *data, size_t length) {
    ssize_t sent = send(link->fd, data, length, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) return false;
    size_t left = length - (size_t)(sent < 0 ? 0 : sent);
    if (left > sizeof link->waiting) return false;
    memcpy(link->waiting, data + length - left, left);
    link->waiting_length = left;
    return true;
}

static bool send_waiting(Link *link) {
    if (link->waiting_length == 0) return true;
    ssize_t sent = send(link->fd, link->waiting, link->waiting_length, MSG_NOSIGNAL);
    if (sent < 0) return errno == EAGAIN;
    link->waiting_length -= (size_t)sent;
    memmove(link->waiting, link->waiting + sent, link->waiting_length);
    return true;
}

static void enqueue(Link *link) {
    Link *place = last;
    while (place != NULL && place->due > link->due) place = place->before;
    link->before = place;
    link->after = place != NULL ? place->after : first;
    *(link->after != NULL ? &link->after->before : &last) = link;
    *(place != NULL ? &place->after : &first) = link;
}

static void dequeue(Link *link) {
    *(link->before != NULL ? &link->before->after : &first) = link->after;
    *(link->after != NULL ? &link->after->before : &last) = link->before;
}

static void drop(Link *link) {
    if (link->deltas >= 0) dequeue(link);
    close(link->fd);
    free(link->body);
    free(link);
}

static void keep_body(void *whose, const char *data, size_t length) {
    Link *link = whose;
    if (link->length + length > link->room) {
        link->room = (link->length + length) * 2;
        link->body = realloc(link->body, link->room);
    }
    memcpy(link->body + link->length, data, length);
    link->length += length;
}

/* What follows a key of the body, wherever a proxy has put it; keys in prompts have their quotes escaped. */
static const char *value(const Link *link, const char *key) {
    const char *at = memmem(link->body, link->length, key, strlen(key));
    if (at == NULL) return "";
    at += strlen(key);
    return at + strspn(at, ": ");
}

static int64_t next_place(int64_t now) {
    static uint32_t streams;
    double part = ++streams * 0.6180339887498949;
    int64_t due = now - now % period + (int64_t)((part - (int64_t)part) * (double)period);
    return due < now ? due + period : due;
}

static bool give_answer(Link *link) {
    int64_t now = now_ns();
    keep_body(link, "", 1);
    bool is_stream = strncmp(value(link, "\"stream\""), "true", 4) == 0;
    int deltas = is_stream ? atoi(value(link, "\"max_tokens\"")) : -1;
    link->length = 0;
    if (!is_stream) {
        put_digits(answer + answer_stamp + 2, 19, now);
        return send_all(link, answer, answer_length);
    }
    link->deltas = deltas;
    link->due = next_place(now);
    enqueue(link);
    return send_all(link, opening, opening_length);
}

static bool receive(Link *link) {
    static char data[READ_AT_ONCE];
    ssize_t length = recv(link->fd, data, sizeof data, 0);
    if (length < 0) return errno == EAGAIN;
    if (length == 0 || link->deltas >= 0) return false; /* nobody sends a request in the middle of a stream */
    read_message(&link->message, data, (size_t)length, keep_body, link);
    if (link->message.part != DONE) return true;
    begin_message(&link->message, false);
    return give_answer(link);
}

static bool beat(Link *link) {
    dequeue(link);
    bool is_well = send_waiting(link);
    if (is_well && link->waiting_length == 0 && link->deltas == 0) {
        link->deltas = -1;
        return send_all(link, ending, ending_length);
    }
    if (is_well && link->waiting_length == 0) {
        int64_t now = now_ns(), late = (now - link->due) / 1000;
        put_digits(delta + delta_stamp + 2, 19, now);
        put_digits(delta + delta_stamp + 22, 8, late);
        is_well = send_all(link, delta, delta_length);
        link->deltas--;
    }
    link->due += period;
    enqueue(link);
    return is_well;
}

static void accept_all(int epoll, int listener) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        Link *link = calloc(1, sizeof *link);
        link->fd = fd;
        link->deltas = -1;
        begin_message(&link->message, false);
        no_delay(fd);
        watch(epoll, EPOLL_CTL_ADD, fd, EPOLLIN, link);
    }
}

static int serve(void) {
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    if (bind(listener, (void *)&address, length) < 0 || listen(listener, 1024) < 0) fail("listen");
    getsockname(listener, (void *)&address, &length);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return listener;
}

int main(int count, char **arguments) {
    if (count != 2) return 2;
    begin_program();
    period = SECOND / atoi(arguments[1]);
    make_answers();
    int epoll = epoll_create1(EPOLL_CLOEXEC), timer = new_timer(epoll), listener = serve();
    watch(epoll, EPOLL_CTL_ADD, listener, EPOLLIN, &listener);
    for (;;) {
        struct epoll_event events[64];
        if (first != NULL) set_timer(timer, first->due);
        int ready = epoll_wait(epoll, events, 64, -1);
        for (int i = 0; i < ready; i++) {
            Link *link = events[i].data.ptr;
            if (events[i].data.ptr == &listener) accept_all(epoll, listener);
            else if (link != NULL && !receive(link)) drop(link);
        }
        /* Where no stream is left the timer may still be due: reading takes its signal away. */
        uint64_t times;
        if (first == NULL) (void)!read(timer, &times, sizeof times);
        for (int64_t now = now_ns(); first != NULL && first->due <= now;) {
            Link *link = first;
            if (!beat(link)) drop(link);
        }
    }
}
